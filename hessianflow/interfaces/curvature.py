"""Protocols of curvature probes, and of the operators that they measure."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from hessianflow.interfaces.control import CurvatureReading, Stateful


class CurvatureProbe(Stateful, Protocol):
    """A measurement of a model's curvature that leaves no trace on the model."""

    def __call__(self) -> CurvatureReading: ...


@runtime_checkable
class LinearOperator(Protocol):
    """A symmetric matrix, as curvature algorithms see it."""

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def matvec(self, vector: Tensor) -> Tensor: ...


@runtime_checkable
class Budgeted(Protocol):
    """A probe with its own budget, which is asked before every reading."""

    def is_affordable(self, examples: int) -> bool:
        """Return whether a reading is affordable after training on `examples` examples.

        If not, the controller decides without a reading.
        """


@runtime_checkable
class Remarks(Protocol):
    """A probe that says what its latest reading leaves out."""

    note: str
    """Recorded once a run; empty if there is nothing to say."""


@runtime_checkable
class MeasuresModel(Protocol):
    """A probe that gives the model it measures."""

    @property
    def model(self) -> object: ...


@runtime_checkable
class JudgesStatistics(Protocol):
    """An operator on a model with batch normalisation that can compare the model's statistics."""

    def statistics_losses(self) -> tuple[float, float, float] | None:
        """Return the losses under running and under own statistics, and the count of their means.

        Without anything to compare, it returns None.
        """
