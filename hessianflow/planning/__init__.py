"""Predictions of a run on more workers, from a model of step time and communication."""

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
    "PerformanceModel",
    "Phase",
    "Prediction",
    "measure_steps",
    "predict",
]
