"""The trainer's world of several ranks, which share gradients, buffers and decisions.

At the start all must run the same program, which wrong weights would show only later.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hessianflow.distributed.process_group import (
    current_reducer,
    from_environment,
    local_device,
    process_group,
)
from hessianflow.distributed.state import average_buffers, broadcast_module, broadcast_state
from hessianflow.distributed.synchronize import GradientSynchronizer
from hessianflow.interfaces import AgreedError, HessianFlowError, Shardable, StepResult, Wishes
from hessianflow.interfaces.errors import first_line
from hessianflow.interfaces.world import GroupReducer, LocalReducer
from hessianflow.measuring import unwrap


def code_fingerprint(files: Sequence[str | Path] = ()) -> str:
    """Return a hash of this package's sources, torch's version and further files (the script)."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in [*sorted(package.rglob("*.py")), *map(Path, files)]:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def check_same_program(reducer: GroupReducer, settings: Mapping[str, Any], code: str) -> None:
    """Refuse ranks that differ, on all of them, before anything is trained.

    Args:
        reducer: Reducer of the group.
        settings: Plain values that decide the run, by name, without those that may differ (rank,
            device index).
        code: Result of :func:`code_fingerprint`.

    Raises:
        AgreedError: A rank differs from rank 0. Every rank raises it, and the message names the
            rank and the difference.
    """
    everyone = reducer.gather((dict(settings), code))
    reference, reference_code = everyone[0]
    for rank, (theirs, their_code) in enumerate(everyone):
        for name in [*reference, *theirs]:
            first = reference.get(name, "absent")
            other = theirs.get(name, "absent")
            if first != other:
                raise AgreedError(
                    f"all ranks must have the same settings: {name} is {first!r} on rank 0 but"
                    f" {other!r} on rank {rank}; start every rank with the same command"
                )
        if their_code != reference_code:
            raise AgreedError(
                f"all ranks must run the same code: rank 0 has {reference_code} but rank {rank} has"
                f" {their_code}; install the same versions of hessianflow, torch and the script"
                " everywhere"
            )


class GroupWorld:
    """One of several ranks, a :class:`~hessianflow.interfaces.World` for a trainer.

    Args:
        reducer: Reducer of the group. Under torchrun :func:`launched_world` makes the world.
        device: Device on which this rank's model and data belong.

    Attributes:
        agreed: Wishes of any rank at the end of the last step.

    Raises:
        HessianFlowError: At the start, ranks differ in code or settings, the model is wrapped in
            DistributedDataParallel, or the training data cannot be divided; at a step, see
            :class:`GradientSynchronizer`.
    """

    def __init__(self, reducer: GroupReducer, device: torch.device | str = "cpu") -> None:
        self._follow(reducer)
        self.device = torch.device(device)
        self._wishes: Callable[[], Wishes] = Wishes
        self.agreed = Wishes()

    def _follow(self, reducer: GroupReducer) -> None:
        self._reducer = reducer
        self.rank = reducer.rank
        self.world_size = reducer.world_size

    @property
    def waited_seconds(self) -> float:
        """Return the time spent waiting for other ranks at the ends of steps, in all."""
        return self._synchronizer.waited_seconds

    def rejoin(self, reducer: GroupReducer) -> None:
        """Continue, between two steps, in another generation of the group, without its state."""
        self._follow(reducer)
        self._synchronizer.rejoin(reducer)

    def attach(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of `parameters` over ranks from now on."""
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise HessianFlowError(
                f"the model is wrapped in {type(model).__name__}: pass the bare module, its"
                " gradients are summed here"
            )
        self._module = unwrap(model)
        self._parameters = parameters
        self._synchronizer = GradientSynchronizer(parameters, self._reducer)

    def compare(self, settings: Mapping[str, Any]) -> None:
        """Refuse ranks with different code or settings; see :func:`check_same_program`."""
        check_same_program(self._reducer, settings, code_fingerprint())

    def meet(self, settings: Mapping[str, Any]) -> None:
        """Check that all ranks run the same program, then give all of them rank 0's weights."""
        shapes = {f"parameter {n}": list(p.shape) for n, p in enumerate(self._parameters)}
        self.compare({**settings, **shapes})
        broadcast_module(self._reducer, self._module)
        held = {id(p) for p in self._module.parameters()}
        others = nn.ParameterList(p for p in self._parameters if id(p) not in held)
        broadcast_module(self._reducer, others)

    def shard(self, data: Any) -> None:
        """Let the training data yield this rank's contiguous part of every batch."""
        if not isinstance(data, Shardable):
            raise HessianFlowError(
                f"{type(data).__name__} cannot be shared out to {self.world_size} ranks: it lacks "
                "set_shard(rank, world_size); use the batches of hf.data"
            )
        data.set_shard(self.rank, self.world_size)

    def begin(self, examples: int) -> None:
        """Announce this rank's share; see :meth:`GradientSynchronizer.begin`."""
        self._synchronizer.begin(examples, weight=0)

    def last_backward(self, weight: float | Tensor) -> AbstractContextManager[None]:
        """Enter the last backward pass, see :meth:`GradientSynchronizer.last_backward`."""
        return self._synchronizer.last_backward(weight)

    def post(self, wishes: Callable[[], Wishes]) -> None:
        """Ask `wishes` at the end of every step from now on."""
        self._wishes = wishes

    def finish(self, own: StepResult) -> StepResult:
        """Return the result of all ranks; see :meth:`GradientSynchronizer.finish`."""
        result, raised = self._synchronizer.finish(own, self._wishes())
        self.agreed = Wishes(*map(bool, raised))
        return result

    def average_buffers(self) -> None:
        """Average the buffers, see :func:`~hessianflow.distributed.average_buffers`."""
        average_buffers(self._reducer, self._module)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        with torch.no_grad():
            return self._reducer.sum(tensor)

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank, on other ranks with its tensors on the CPU."""
        return broadcast_state(self._reducer, value)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's plain value, in the order of ranks."""
        return self._reducer.gather(value)


@contextmanager
def launched_world(device: str = "cpu") -> Iterator[GroupWorld]:
    """Yield the world of the processes that torchrun started, or of this one alone, then leave it.

    Args:
        device: "cpu", or "cuda", which becomes a device of its own for each process of a machine.

    Raises:
        HessianFlowError: There is no device for this process, one device is named for several, or
            another rank failed.
    """
    place = from_environment()
    if place is None:
        yield GroupWorld(LocalReducer(), device)
        return
    named = torch.device(device)
    if named.index is not None and place.world_size > 1:
        raise AgreedError(
            f"device {device} is one for {place.world_size} processes: use {named.type}, each takes"
            " its own"
        )
    own = local_device(device, place.local_rank)
    try:
        with process_group(place, own) as reducer:
            yield GroupWorld(reducer, own)
    except RuntimeError as error:
        if not any(backend in str(error) for backend in ("gloo", "NCCL")):
            raise
        raise HessianFlowError(f"another rank failed or was ended: {first_line(error)}") from error


def current_world(device: torch.device | str = "cpu") -> GroupWorld:
    """Return the world of the process group that exists already, or of this process alone.

    Use it when you train under torchrun, accelerate, Lightning or your own
    `DistributedDataParallel`: `hf.distributed.sharded(hf.distributed.current_world())` is the
    `operator` of a probe that measures the examples of all ranks. All ranks must call this function
    together. The group is not changed.

    Args:
        device: Device on which this rank's model and data belong.
    """
    return GroupWorld(current_reducer(), device)
