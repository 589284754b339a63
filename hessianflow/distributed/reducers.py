"""The protocol of reducers, by which ranks exchange data, and the reducer of a single process."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from hessianflow.interfaces import Reducer


class GroupReducer(Reducer, Protocol):
    """A reducer that can also overlap a sum with other work, and gather a value from every rank."""

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to sum a contiguous `tensor` over ranks in place, and return a function.

        Call the function before you read the tensor.
        """
        ...

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's plain value, in the order of ranks, on every rank."""
        ...

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Replace a contiguous `tensor` by rank 0's, in place."""
        ...


class LocalReducer:
    """The reducer of a single process, which returns every value as it is."""

    rank = 0
    world_size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the tensor itself."""
        return tensor

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:  # noqa: ARG002
        """Return a function that does nothing, since there is nothing to wait for."""
        return _nothing

    def broadcast(self, value: Any) -> Any:
        """Return the value itself."""
        return value

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Leave the tensor as it is."""

    def gather(self, value: Any) -> list[Any]:
        """Return a list of this one value."""
        return [value]


def _nothing() -> None:
    pass
