"""Dual-batch learning: plan, server, workers, records and checkpoints joined into a run.

Like :mod:`hessianflow.build`, this package may import every other one; none of them imports it.
"""

from hessianflow.dual_batch.build import build_dual_batch
from hessianflow.dual_batch.local_training import Course, LocalTraining
from hessianflow.dual_batch.ray_server import train_on_ray
from hessianflow.dual_batch.server import ParameterServer
from hessianflow.dual_batch.simulated_server import Commit, simulate
from hessianflow.dual_batch.trainer import DualBatchTask, DualBatchTrainer
from hessianflow.dual_batch.transports import OnRay, Simulated

__all__ = [
    "Commit",
    "Course",
    "DualBatchTask",
    "DualBatchTrainer",
    "LocalTraining",
    "OnRay",
    "ParameterServer",
    "Simulated",
    "build_dual_batch",
    "simulate",
    "train_on_ray",
]
