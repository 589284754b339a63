"""What measures curvature, and what it measures."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from hessianflow.interfaces.control import CurvatureReading, Stateful


class CurvatureProbe(Stateful, Protocol):
    """Measures the curvature of the model it was built for and leaves no trace on it."""

    def __call__(self) -> CurvatureReading: ...


@runtime_checkable
class LinearOperator(Protocol):
    """All that curvature algorithms see of a symmetric matrix."""

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def matvec(self, vector: Tensor) -> Tensor: ...
