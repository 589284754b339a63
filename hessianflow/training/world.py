"""The world of one process, and actions whose outcome all ranks share."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from hessianflow.interfaces import AgreedError, HessianFlowError, StepResult, Wishes, World
from hessianflow.interfaces.world import LocalReducer

T = TypeVar("T")
_NO_CONTEXT: AbstractContextManager[None] = nullcontext()


class LocalWorld(LocalReducer):
    """The world of a single process, which exchanges nothing."""

    def __init__(self) -> None:
        self._wishes: Callable[[], Wishes] = Wishes
        self.agreed = Wishes()

    def attach(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Do nothing: the gradients are whole as they are."""

    def meet(self, settings: Mapping[str, Any]) -> None:
        """Do nothing: there is no other rank to differ from."""

    def shard(self, data: Any) -> None:
        """Do nothing: the data stay whole."""

    def begin(self, examples: int) -> None:
        """Remember the size of the batch, and refuse an empty one."""
        if examples == 0:
            raise HessianFlowError(
                "a batch of 0 examples has no mean loss: check the training data"
            )
        self._examples = examples

    def last_backward(self, weight: float | Tensor) -> AbstractContextManager[None]:  # noqa: ARG002
        """Return a context that does nothing: one process sends no gradient away."""
        return _NO_CONTEXT

    def post(self, wishes: Callable[[], Wishes]) -> None:
        """Ask `wishes` at the end of every step from now on."""
        self._wishes = wishes

    def finish(self, own: StepResult) -> StepResult:
        """Return the result with the number of examples that :meth:`begin` was told."""
        self.agreed = self._wishes()
        if own.examples == self._examples:
            return own
        return replace(own, examples=self._examples)

    def average_buffers(self) -> None:
        """Do nothing: the buffers are those of all ranks."""


def on_first_rank(world: World, action: Callable[[], T]) -> T:
    """Act on rank 0, and return the result (plain values), or raise the error, on every rank."""
    value = None
    message: str | None = None
    failure: HessianFlowError | None = None
    if world.rank == 0:
        try:
            value = action()
        except HessianFlowError as error:
            failure = error
            message = str(error)
    value, message = world.broadcast((value, message))
    if failure is not None:
        raise failure
    if message is not None:
        raise AgreedError(message)
    return value  # type: ignore[no-any-return]


def on_all_ranks(world: World, action: Callable[[], T]) -> T:
    """Act on every rank; if one fails, raise the first error on all, so that none waits for it."""
    own: str | None = None
    failure: HessianFlowError | None = None
    try:
        value = action()
    except HessianFlowError as error:
        failure = error
        own = str(error)
    failed = [(r, text) for r, text in enumerate(world.gather(own)) if text is not None]
    if not failed:
        return value
    if failure is not None and world.rank == 0:
        raise failure
    rank, message = failed[0]
    if rank > 0:
        message = f"on rank {rank}: {message}"
    raise AgreedError(message) from failure
