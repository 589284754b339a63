"""Process groups of torch.distributed: found from torchrun's environment, entered, left, and
entered again.

A run lives through one or more generations. A generation is one membership of the group: its
number, this process's rank and the number of ranks. All generations of a run share one key-value
store; each keeps its keys under a prefix of its own, so that a new group can be formed in place, in
milliseconds, without a trace of the one before.

On a CUDA device the group has two backends: NCCL for tensors on the device and gloo for those on
the host, so that counts, flags and plain values are agreed on without waiting for the device.
"""

import gc
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from hessianflow.distributed.plain import dumps, loads
from hessianflow.distributed.store import gloo_on_this_machine, serve
from hessianflow.interfaces import HessianFlowError

TIMEOUT_SECONDS = 600.0
"""How long a rank waits for the others in one collective. Ours: torch's own default for NCCL."""

_LONGEST_NUMBER = 18
"""Characters of a number in the environment."""


@dataclass(frozen=True)
class Generation:
    """One membership of the process group.

    Attributes:
        number: 0, 1, ...: which membership of the run this is.
        rank: of this process, in [0, world_size).
        world_size: number of ranks.
        local_rank: place among the processes of this machine, which is also the index of its CUDA
            device.
    """

    number: int
    rank: int
    world_size: int
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise HessianFlowError(
                f"rank must lie in [0, world_size), got rank {self.rank} of {self.world_size}"
            )


def from_environment(environment: Mapping[str, str] | None = None) -> Generation | None:
    """Return the place torchrun (or any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK) gave to
    this process.

    Returns:
        None when RANK is not set: an ordinary run of one process.

    Raises:
        HessianFlowError: RANK without WORLD_SIZE, MASTER_ADDR or MASTER_PORT, or numbers that do
            not fit together or cannot be.
    """
    found = os.environ if environment is None else environment
    if "RANK" not in found:
        return None
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not found.get(name)]
    if missing:
        raise HessianFlowError(
            f"RANK is set but {', '.join(missing)} is not: start with torchrun, or unset RANK"
        )
    port = _number(found, "MASTER_PORT")
    if not 0 < port < 1 << 16:
        raise HessianFlowError(
            f"MASTER_PORT must be a port, 1 to 65535, got {port}: start with torchrun, or unset"
            " RANK"
        )
    rank, world_size = _number(found, "RANK"), _number(found, "WORLD_SIZE")
    local_rank = _number(found, "LOCAL_RANK") if "LOCAL_RANK" in found else 0
    if local_rank < 0:
        raise HessianFlowError(
            f"LOCAL_RANK must be at least 0, got {local_rank}: start with torchrun, or unset RANK"
        )
    return Generation(0, rank, world_size, local_rank)


def local_device(name: str, local_rank: int) -> torch.device:
    """Return the device of one process of a machine: "cuda" becomes "cuda:<local_rank>", others
    stay.

    Raises:
        HessianFlowError: more processes than CUDA devices on this machine.
    """
    if name != "cuda":
        return torch.device(name)
    devices = torch.cuda.device_count()
    if local_rank >= devices:
        raise HessianFlowError(
            f"local rank {local_rank} has no CUDA device of its own, this machine has {devices}: "
            f"start at most {devices} processes here, or use --device cpu"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def process_group(
    generation: Generation, device: torch.device, *, timeout_seconds: float = TIMEOUT_SECONDS
) -> Iterator["ProcessGroupReducer"]:
    """Take part in the group that the launcher's environment describes, and leave it in an order
    that is safe.

    On success: what is left of the body's objects (a live DDP object makes gloo abort at exit) is
    collected, all ranks meet, the group is destroyed. When the body raises: the group is aborted,
    since a rank in trouble must not wait for ranks that wait for it.

    Args:
        generation: from :func:`from_environment`.
        device: of the model; decides the backend, and becomes the current CUDA device.
        timeout_seconds: see :data:`TIMEOUT_SECONDS`.

    Yields:
        The reducer of this generation.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(generation.world_size)
    store = _meeting_point(generation, address, port, timeout_seconds, one_machine)
    # The agent's store outlives workers that it restarts: each attempt meets under keys of its own.
    attempt = f"hessianflow/attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    with gloo_on_this_machine() if one_machine else nullcontext():
        reducer = enter(
            generation, PrefixStore(attempt, store), device, timeout_seconds=timeout_seconds
        )
    try:
        yield reducer
    except BaseException:
        abort()
        raise
    leave(collect=True)


def _meeting_point(
    generation: Generation, address: str, port: int, timeout_seconds: float, one_machine: bool
) -> TCPStore:
    """Return the store of the launcher's environment: served here, or that of whoever serves it.

    Rank 0 serves on MASTER_ADDR alone, where that is one address of its machine that the others can
    reach.
    """
    wait = timedelta(seconds=timeout_seconds)
    # torchrun's agent already serves this store; under another launcher rank 0 does.
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        if served or generation.rank > 0:
            return TCPStore(address, port, is_master=False, timeout=wait)
        if _is_one_address(address, one_machine):
            return serve(address, port, timeout=wait)
        return TCPStore(address, port, is_master=True, timeout=wait)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, HessianFlowError):
            raise
        raise HessianFlowError(
            f"rank {generation.rank} of {generation.world_size} cannot meet the others at"
            f" {address}:{port}, as MASTER_ADDR and MASTER_PORT say: {_first_line(error)}; start"
            " with torchrun, or unset RANK"
        ) from error


def _is_one_address(name: str, one_machine: bool) -> bool:
    """Return whether all ranks reach this machine by the same address; a name may mean others
    elsewhere."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return False
    loopback = any(
        ipaddress.ip_address(str(number).partition("%")[0]).is_loopback for number in found
    )
    return one_machine if loopback else len(found) == 1


def enter(
    generation: Generation,
    store: Store,
    device: torch.device,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> "ProcessGroupReducer":
    """Form the default process group of one generation; returns when every rank of it has come.

    Raises:
        HessianFlowError: this process is still in a group, or some ranks did not come within the
            timeout.
    """
    if dist.is_initialized():
        raise HessianFlowError(
            "this process is in a process group already: leave it before entering another"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    wait = timedelta(seconds=timeout_seconds)
    prefixed = PrefixStore(f"generation/{generation.number}", store)
    try:
        dist.init_process_group(
            backend,
            store=prefixed,
            rank=generation.rank,
            world_size=generation.world_size,
            timeout=wait,
        )
    except RuntimeError as error:  # of torch's store and of gloo alike
        _forget_failed_group()
        raise HessianFlowError(
            f"rank {generation.rank} could not meet the {generation.world_size} ranks of generation"
            f" {generation.number} within {timeout_seconds:g} s: {_first_line(error)}"
        ) from error
    return ProcessGroupReducer(generation)


def leave(*, collect: bool = False) -> None:
    """Leave the group together with all its ranks.

    Args:
        collect: run the garbage collector first (0.3 s), needed when a DistributedDataParallel
            object was in use.
    """
    if collect:
        gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def abort() -> None:
    """Leave the group at once, without the other ranks: they may be dead, or waiting for this
    one."""
    if dist.is_initialized():
        # torch 2.6 and later; gloo's destruction does not wait in earlier releases either
        getattr(dist.group.WORLD, "abort", lambda: None)()
        dist.destroy_process_group()


class ProcessGroupReducer:
    """How the ranks of the default process group agree; made by :func:`enter`.

    Attributes:
        generation: the membership this reducer belongs to.
    """

    def __init__(self, generation: Generation) -> None:
        self.generation = generation

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.generation.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.generation.world_size

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks: `tensor` itself, overwritten, or a new one where it is not
        contiguous."""
        summed = tensor.contiguous()
        dist.all_reduce(summed)
        return summed

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to sum a contiguous tensor in place; the function returned waits for it."""
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None
        return lambda: _finish(work)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's plain value, on every rank; rank 0 keeps its own object."""
        content = dumps(value) if self.rank == 0 else b""
        size = torch.tensor([len(content)])
        dist.broadcast(size, src=0)
        carrier = _carrier(content, int(size))
        dist.broadcast(carrier, src=0)
        return value if self.rank == 0 else loads(carrier.numpy().tobytes())

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by rank 0's, in place."""
        dist.broadcast(tensor, src=0)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's plain value, in the order of ranks, on every rank."""
        content = dumps(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(content)]))
        largest = max(int(size) for size in sizes)
        carriers = [torch.empty(largest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(carriers, _carrier(content, largest))
        return [
            loads(c[: int(size)].numpy().tobytes()) for c, size in zip(carriers, sizes, strict=True)
        ]


def _forget_failed_group() -> None:
    """Let torch number its groups from zero again, as it does when a group is destroyed.

    A group that failed to form has been counted, and the number is part of the keys that the next
    one meets under: ranks that count differently would wait for each other for ever.
    """
    abort()
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    dist.destroy_process_group()


def _carrier(content: bytes, size: int) -> Tensor:
    """Return a tensor of so many bytes that begins with `content`."""
    carrier = torch.zeros(size, dtype=torch.uint8)
    carrier[: len(content)] = torch.frombuffer(bytearray(content or b" "), dtype=torch.uint8)[
        : len(content)
    ]
    return carrier


def _finish(work: Any) -> None:
    work.wait()


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if len(text) <= _LONGEST_NUMBER and re.fullmatch(r"\s*[+-]?[0-9]+\s*", text):
        return int(text)
    shown = repr(text) if len(text) <= _LONGEST_NUMBER else f"{text[:_LONGEST_NUMBER]!r}..."
    raise HessianFlowError(
        f"{name} must be a whole number, got {shown}: start with torchrun, or unset RANK"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
