"""Dual-batch learning: plan, server, workers, records and checkpoints joined into a run.

Like :mod:`hessianflow.build`, this room may use every other one; none of them knows it.
"""

from hessianflow.dual_batch.build import build_dual_batch
from hessianflow.dual_batch.local_training import Course, LocalTraining
from hessianflow.dual_batch.trainer import DualBatchTrainer, Job
from hessianflow.dual_batch.transports import OnRay, Simulated

__all__ = [
    "Course",
    "DualBatchTrainer",
    "Job",
    "LocalTraining",
    "OnRay",
    "Simulated",
    "build_dual_batch",
]
