"""Process groups of torch.distributed, formed from torchrun's environment, left and formed again.

A run consists of one or more generations. A generation is one membership of the group: its number,
this process's rank and the number of ranks. All generations of a run share one key-value store;
each has its own prefix of keys, so that a new group can be formed in place, in milliseconds,
without traces of the previous one.

On a CUDA device the group has two backends: NCCL for tensors on the device and gloo for those on
the host, so that ranks agree on counts, flags and plain values without waiting for the device.
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
from hessianflow.interfaces.errors import HessianFlowError, first_line
from hessianflow.interfaces.world import GroupReducer, LocalReducer

TIMEOUT_SECONDS = 600.0
"""Time that a rank waits for the others in one collective, torch's own default for NCCL."""

_LONGEST_NUMBER = 18
"""Most characters of a number in the environment."""
_WAY_OUT = "start with torchrun, or unset RANK"


@dataclass(frozen=True)
class Generation:
    """One membership of the process group.

    Attributes:
        number: Number of the membership in the run, from 0.
        rank: Rank of this process, in [0, world_size).
        world_size: Number of ranks.
        local_rank: Rank among the processes of this machine, also the index of its CUDA device.
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
    """Return the membership that torchrun describes; None without RANK, in a run of one process.

    Args:
        environment: Variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; None for
            those of this process.

    Raises:
        HessianFlowError: RANK is set without WORLD_SIZE, MASTER_ADDR or MASTER_PORT, or numbers are
            impossible or do not fit together.
    """
    if environment is None:
        environment = os.environ
    if "RANK" not in environment:
        return None
    required = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in required if not environment.get(name)]
    if missing:
        raise HessianFlowError(f"RANK is set but {', '.join(missing)} is not: {_WAY_OUT}")
    port = _number(environment, "MASTER_PORT")
    if not 0 < port < 1 << 16:
        raise HessianFlowError(f"MASTER_PORT must be a port, 1 to 65535, got {port}: {_WAY_OUT}")
    rank = _number(environment, "RANK")
    world_size = _number(environment, "WORLD_SIZE")
    local_rank = _number({"LOCAL_RANK": "0", **environment}, "LOCAL_RANK")
    if local_rank < 0:
        raise HessianFlowError(f"LOCAL_RANK must be at least 0, got {local_rank}: {_WAY_OUT}")
    return Generation(0, rank, world_size, local_rank)


def local_device(name: str, local_rank: int) -> torch.device:
    """Return the device of one process of a machine; "cuda" becomes "cuda:<local_rank>".

    Raises:
        HessianFlowError: This machine has more processes than CUDA devices.
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
    """Join the group that the launcher's environment describes, and leave it in a safe order.

    On success, garbage of the body is collected (a live DDP object makes gloo abort at exit), all
    ranks meet, and the group is destroyed. If the body raises, the group is aborted, since a rank
    in trouble must not wait for ranks that wait for it.

    Args:
        generation: Membership from :func:`from_environment`, whose reducer is yielded.
        device: Device of the model, which decides the backend and becomes the current CUDA device.
        timeout_seconds: Time limit of each collective.
    """
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(generation.world_size)
    store = _meeting_point(generation, address, port, timeout_seconds, one_machine)
    # The agent's store outlives workers that it restarts, so each attempt needs its own keys.
    attempt = f"hessianflow/attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    own_keys = PrefixStore(attempt, store)
    with gloo_on_this_machine() if one_machine else nullcontext():
        reducer = enter(generation, own_keys, device, timeout_seconds=timeout_seconds)
    try:
        yield reducer
    except BaseException:
        abort()
        raise
    leave(collect=True)


def _meeting_point(
    generation: Generation, address: str, port: int, timeout_seconds: float, one_machine: bool
) -> TCPStore:
    """Return the store of the launcher's environment, which this process serves or connects to.

    Rank 0 serves on MASTER_ADDR alone, if the others can reach that address of its machine.
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
            f" {address}:{port}, as MASTER_ADDR and MASTER_PORT say: {first_line(error)};"
            f" {_WAY_OUT}"
        ) from error


def _is_one_address(name: str, one_machine: bool) -> bool:
    """Return whether `name` is the same single address for all ranks.

    Elsewhere, a loopback address or a name of several addresses may mean another machine.
    """
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    addresses = {str(answer[4][0]) for answer in answers}
    if any(ipaddress.ip_address(each.partition("%")[0]).is_loopback for each in addresses):
        return one_machine
    return len(addresses) == 1


def enter(
    generation: Generation,
    store: Store,
    device: torch.device,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> "ProcessGroupReducer":
    """Form the default process group of one generation, once all its ranks have arrived.

    Raises:
        HessianFlowError: This process is still in a group, or some ranks did not arrive in time.
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
    rank = generation.rank
    size = generation.world_size
    try:
        dist.init_process_group(backend, store=prefixed, rank=rank, world_size=size, timeout=wait)
    except RuntimeError as error:  # both torch's store and gloo raise it
        _forget_failed_group()
        raise HessianFlowError(
            f"rank {rank} could not meet the {size} ranks of generation {generation.number} within"
            f" {timeout_seconds:g} s: {first_line(error)}"
        ) from error
    return ProcessGroupReducer(generation)


def current_reducer() -> GroupReducer:
    """Return a reducer of the process group that exists already, or of this process alone.

    A group without a backend for the CPU (NCCL alone) gets a second group of gloo beside it. All
    ranks must form that group together, so all must call this function.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return LocalReducer()
    rank = dist.get_rank()
    place = Generation(0, rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)))
    group = None
    if not any(name in dist.get_backend_config() for name in ("gloo", "mpi")):
        group = dist.new_group(backend="gloo")
    return ProcessGroupReducer(place, group)


def leave(*, collect: bool = False) -> None:
    """Leave the group together with all its ranks.

    With `collect` the garbage collector runs first (0.3 s), as needed after the use of a
    DistributedDataParallel object.
    """
    if collect:
        gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def abort() -> None:
    """Leave the group at once, without the other ranks, which may be dead or wait for this one."""
    if dist.is_initialized():
        # torch has `abort` from 2.6 on; in earlier releases, destroying gloo does not wait.
        getattr(dist.group.WORLD, "abort", lambda: None)()
        dist.destroy_process_group()


class ProcessGroupReducer:
    """The reducer of the default process group, made by :func:`enter` for one `generation`.

    If `group` is given, it uses that group of the same ranks instead of the default one.
    """

    def __init__(self, generation: Generation, group: dist.ProcessGroup | None = None) -> None:
        self.generation = generation
        self._group = group
        self.rank = generation.rank
        self.world_size = generation.world_size

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks, in `tensor` itself unless it is not contiguous."""
        summed = tensor.contiguous()
        dist.all_reduce(summed, group=self._group)
        return summed

    def start_sum(self, tensor: Tensor) -> Callable[[], object]:
        """Begin to sum a contiguous tensor in place, and return a function that waits for it."""
        work = dist.all_reduce(tensor, group=self._group, async_op=True)
        assert work is not None
        wait: Callable[[], object] = work.wait
        return wait

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's plain value on every rank; rank 0 keeps its own object."""
        content = dumps(value) if self.rank == 0 else b""
        size = torch.tensor([len(content)])
        dist.broadcast(size, src=0, group=self._group)
        carrier = _carrier(content, int(size))
        dist.broadcast(carrier, src=0, group=self._group)
        return value if self.rank == 0 else loads(carrier.numpy().tobytes())

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by rank 0's, in place."""
        dist.broadcast(tensor, src=0, group=self._group)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's plain value, in the order of ranks, on every rank."""
        content = dumps(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(content)]), group=self._group)
        largest = max(int(size) for size in sizes)
        carriers = [torch.empty(largest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(carriers, _carrier(content, largest), group=self._group)
        return [
            loads(c[: int(size)].numpy().tobytes()) for c, size in zip(carriers, sizes, strict=True)
        ]


def _forget_failed_group() -> None:
    """Make torch count its groups from zero again, as it does when a group is destroyed.

    torch also counts a group that failed to form, and the count is part of the keys of the next
    one: ranks that count differently would wait for each other for ever.
    """
    abort()
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    dist.destroy_process_group()


def _carrier(content: bytes, size: int) -> Tensor:
    """Return a tensor of `size` bytes that begins with `content`."""
    carrier = torch.zeros(size, dtype=torch.uint8)
    if content:  # torch.frombuffer refuses an empty buffer
        carrier[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return carrier


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if len(text) <= _LONGEST_NUMBER and re.fullmatch(r"\s*[+-]?[0-9]+\s*", text):
        return int(text)
    shown = repr(text) if len(text) <= _LONGEST_NUMBER else f"{text[:_LONGEST_NUMBER]!r}..."
    raise HessianFlowError(f"{name} must be a whole number, got {shown}: {_WAY_OUT}")
