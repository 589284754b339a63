"""What a run would take on more workers: a model of step time and communication, and what it rests
on."""

from hessianflow.planning.performance import (
    AllReduceTime,
    PerformanceModel,
    Phase,
    Prediction,
    StepTime,
    fit_all_reduce,
    fit_step_time,
    measure_all_reduce,
    measure_steps,
    predict,
)

__all__ = [
    "AllReduceTime",
    "PerformanceModel",
    "Phase",
    "Prediction",
    "StepTime",
    "fit_all_reduce",
    "fit_step_time",
    "measure_all_reduce",
    "measure_steps",
    "predict",
]
