"""Batch-size controllers: state machines without tensors that turn measurements into decisions.

Every constructor refuses an argument out of its bounds with a HessianFlowError that names the
argument and its bounds.
"""

from collections.abc import Mapping

from hessianflow.control.absa import ABS, ABSA
from hessianflow.control.cabs import CABS
from hessianflow.control.critical_batch import CriticalBatch
from hessianflow.control.diversity import DiveBatch
from hessianflow.control.dual_batch import (
    DualBatch,
    DualBatchPlan,
    Worker,
    WorkerPlan,
    dual_batch_plan,
    plan_workers,
)
from hessianflow.control.lr_scaling import lr_factor
from hessianflow.control.noise_scale import NoiseScale
from hessianflow.control.norm_test import NormTest
from hessianflow.control.published import PUBLISHED, Published
from hessianflow.control.replay import Replay, ReplayStep, replay
from hessianflow.control.resolution import (
    Level,
    ProgressiveResolution,
    Stage,
    resolution_stages,
    stage_at,
)
from hessianflow.control.schedules import AdaBatch, FixedBatch, GrowInsteadOfDecay, Warmup
from hessianflow.control.seesaw import Seesaw
from hessianflow.control.time_model import TimeModel, fit_time_model
from hessianflow.control.timed import TimedSchedule

__all__ = [
    "ABS",
    "ABSA",
    "CABS",
    "CONTROLLERS",
    "PUBLISHED",
    "AdaBatch",
    "CriticalBatch",
    "DiveBatch",
    "DualBatch",
    "DualBatchPlan",
    "FixedBatch",
    "GrowInsteadOfDecay",
    "Level",
    "NoiseScale",
    "NormTest",
    "ProgressiveResolution",
    "Published",
    "Replay",
    "ReplayStep",
    "Seesaw",
    "Stage",
    "TimeModel",
    "TimedSchedule",
    "Warmup",
    "Worker",
    "WorkerPlan",
    "dual_batch_plan",
    "fit_time_model",
    "lr_factor",
    "plan_workers",
    "replay",
    "resolution_stages",
    "stage_at",
]

CONTROLLERS: Mapping[str, type] = {
    "absa": ABSA,
    "abs": ABS,
    "fixed": FixedBatch,
    "warmup": Warmup,
    "adabatch": AdaBatch,
    "grow-instead-of-decay": GrowInsteadOfDecay,
    "noise-scale": NoiseScale,
    "cabs": CABS,
    "divebatch": DiveBatch,
    "critical": CriticalBatch,
    "norm-test": NormTest,
    "seesaw": Seesaw,
    "timed": TimedSchedule,
    "dual-batch": DualBatch,
}
"""Every controller by the name that the command gives it."""
