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


@runtime_checkable
class Budgeted(Protocol):
    """A probe with a budget of its own: it is asked before every reading."""

    def is_affordable(self, examples: int) -> bool:
        """Return whether a reading may be made now that `examples` have been trained on; where it
        may not, the controller decides without one."""
        ...


@runtime_checkable
class MeasuresModel(Protocol):
    """A probe that says which model it measures."""

    @property
    def model(self) -> object: ...


@runtime_checkable
class JudgesStatistics(Protocol):
    """An operator that runs a model with batch normalisation, and can tell whether its running
    statistics have settled."""

    def statistics_losses(self) -> tuple[float, float, float] | None:
        """Return the losses under running and under own statistics, and what they are means over;
        None where there is nothing to compare."""
        ...
