"""Dual-batch learning: plan, server, workers, records and checkpoints joined into a run.

Like :mod:`hessianflow.build`, this room may use every other one; none of them knows it.
"""

from hessianflow.dual_batch.build import (
    build_dual_batch,
)
from hessianflow.dual_batch.local_training import (
    Course,
    LocalTraining,
)
from hessianflow.dual_batch.ray_server import (
    train_on_ray,
)
from hessianflow.dual_batch.server import (
    ParameterServer,
)
from hessianflow.dual_batch.simulated_server import (
    Commit,
    simulate,
)
from hessianflow.dual_batch.trainer import (
    DualBatchTrainer,
    Job,
)
from hessianflow.dual_batch.transports import (
    OnRay,
    Simulated,
)

__all__ = [
    "Commit",
    "Course",
    "DualBatchTrainer",
    "Job",
    "LocalTraining",
    "OnRay",
    "ParameterServer",
    "Simulated",
    "build_dual_batch",
    "simulate",
    "train_on_ray",
]
