"""The trainer's world of several ranks: one process group that shares gradients, buffers and
decisions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hessianflow.distributed.fingerprint import check_same_program, code_fingerprint
from hessianflow.distributed.process_group import from_environment, local_device, process_group
from hessianflow.distributed.state import average_buffers, broadcast_module, broadcast_state
from hessianflow.distributed.synchronize import GradientSynchronizer
from hessianflow.interfaces import AgreedError, HessianFlowError, Shardable, StepResult, Wishes
from hessianflow.interfaces.world import GroupReducer, LocalReducer
from hessianflow.measuring import unwrap


class GroupWorld:
    """A rank of several, for `AdaptiveBatchTrainer(..., world=GroupWorld(reducer))`; see
    `interfaces.World`.

    Args:
        reducer: of the group. Under torchrun :func:`launched_world` makes the world.
        device: where this rank's model and data belong.

    Raises:
        HessianFlowError: at the start: ranks that differ in code or settings, a model in
            DistributedDataParallel, training data that cannot be shared out; at a step: see
            :class:`GradientSynchronizer`.
    """

    def __init__(self, reducer: GroupReducer, device: torch.device | str = "cpu") -> None:
        self._reducer = reducer
        self.device = torch.device(device)
        self._wishes: Callable[[], Wishes] = Wishes
        self._agreed = Wishes()

    @property
    def rank(self) -> int:
        """Return the rank of this process."""
        return self._reducer.rank

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self._reducer.world_size

    @property
    def waited_seconds(self) -> float:
        """Time spent waiting for other ranks at the ends of steps, in all."""
        return self._synchronizer.waited_seconds

    def rejoin(self, reducer: GroupReducer) -> None:
        """Go on, between two steps, in another generation of the group; state is shared
        separately."""
        self._reducer = reducer
        self._synchronizer.rejoin(reducer)

    def attach(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of `parameters` over ranks from now on."""
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise HessianFlowError(
                f"the model is wrapped in {type(model).__name__}: pass the bare module, its"
                " gradients are summed here"
            )
        self._module, self._parameters = unwrap(model), parameters
        self._synchronizer = GradientSynchronizer(parameters, self._reducer)

    def compare(self, settings: Mapping[str, Any]) -> None:
        """Refuse ranks with different code or settings; see :func:`check_same_program`."""
        check_same_program(self._reducer, settings, code_fingerprint())

    def meet(self, settings: Mapping[str, Any]) -> None:
        """Check that all ranks run the same program, then give all of them rank 0's weights."""
        self.compare(
            {
                **settings,
                **{f"parameter {n}": list(p.shape) for n, p in enumerate(self._parameters)},
            }
        )
        broadcast_module(self._reducer, self._module)
        held = {id(p) for p in self._module.parameters()}
        broadcast_module(
            self._reducer, nn.ParameterList(p for p in self._parameters if id(p) not in held)
        )

    def shard(self, data: Any) -> None:
        """Have the training data hand out this rank's contiguous part of every batch."""
        if not isinstance(data, Shardable):
            raise HessianFlowError(
                f"{type(data).__name__} cannot be shared out to {self.world_size} ranks: it lacks "
                "set_shard(rank, world_size); use hf.data.DeviceBatches or hf.data.AdaptiveBatches"
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

    @property
    def agreed(self) -> Wishes:
        """What any rank wished for at the end of the last step."""
        return self._agreed

    def finish(self, own: StepResult) -> StepResult:
        """Return the result of all ranks; see :meth:`GradientSynchronizer.finish`."""
        result, raised = self._synchronizer.finish(own, self._wishes())
        self._agreed = Wishes(*map(bool, raised))
        return result

    def average_buffers(self) -> None:
        """Average the buffers, see :func:`hessianflow.distributed.average_buffers`."""
        average_buffers(self._reducer, self._module)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        with torch.no_grad():
            return self._reducer.sum(tensor)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank; its tensors on the CPU on all ranks but rank 0."""
        return broadcast_state(self._reducer, value)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's plain value, in the order of ranks."""
        return self._reducer.gather(value)


@contextmanager
def launched_world(device: str = "cpu") -> Iterator[GroupWorld]:
    """The world of the processes that torchrun started, or of this one alone; left together at the
    end.

    Args:
        device: "cpu", or "cuda", which becomes a device of its own for each process of a machine.

    Raises:
        HessianFlowError: no device for this process, one device named for several, or another rank
            that failed.
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
        raise HessianFlowError(
            f"another rank failed or was ended: {str(error).splitlines()[0]}"
        ) from error
