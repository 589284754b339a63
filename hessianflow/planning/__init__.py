"""Predictions of a run on more workers, from a model of step time and communication, and branches
of a run at several batch sizes."""

from hessianflow.planning.branches import (
    Branch,
    SizeResult,
    Start,
    branch,
    compared,
    critical_size,
    crossing,
)
from hessianflow.planning.performance import (
    AllReduceTime,
    PerformanceModel,
    Phase,
    Prediction,
    measure_steps,
    predict,
)

__all__ = [
    "AllReduceTime",
    "Branch",
    "PerformanceModel",
    "Phase",
    "Prediction",
    "SizeResult",
    "Start",
    "branch",
    "compared",
    "critical_size",
    "crossing",
    "measure_steps",
    "predict",
]
