"""How ranks agree: the protocol the other modules of this room use, and its case of one process."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from hessianflow.interfaces import Reducer


class GroupReducer(Reducer, Protocol):
    """A reducer that can also overlap a sum with other work and collect one plain value from every
    rank."""

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to replace a contiguous `tensor` by its sum over ranks; call what is returned
        before reading it."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's plain value, in the order of ranks, on every rank."""
        ...

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Replace a contiguous `tensor` by rank 0's, in place."""
        ...


class LocalReducer:
    """One process: every sum is its own, every word its own."""

    rank = 0
    world_size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:  # noqa: ARG002
        """Nothing to wait for."""
        return _nothing

    def broadcast(self, value: Any) -> Any:
        """The value itself."""
        return value

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Leave the tensor as it is."""

    def gather(self, value: Any) -> list[Any]:
        """A list of this one value."""
        return [value]


def _nothing() -> None:
    pass
