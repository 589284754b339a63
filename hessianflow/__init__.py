"""hessianflow: Hessian-driven batch sizes, adversarial regularization and large-batch training for
PyTorch.

Its packages (`hf.curvature`, `hf.control`, ...) are imported when they are first used, so that
`import hessianflow` is fast. So is torch, so that the command can be interrupted while it loads.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hessianflow.memory import keep_freed_memory

if TYPE_CHECKING:
    from hessianflow import (
        adversarial,
        control,
        curvature,
        data,
        distributed,
        dual_batch,
        elastic,
        integrations,
        models,
        normalisation,
        optim,
        planning,
        plots,
        runs,
        training,
    )
    from hessianflow.interfaces import CurvatureReading, Decision, HessianFlowError, Progress
    from hessianflow.losses import ModelLoss, WeightedLoss
    from hessianflow.monitoring import monitor
    from hessianflow.runs.history import History
    from hessianflow.training.trainer import AdaptiveBatchTrainer

__version__ = "0.1.0"
__all__ = [
    "AdaptiveBatchTrainer",
    "CurvatureReading",
    "Decision",
    "HessianFlowError",
    "History",
    "ModelLoss",
    "Progress",
    "WeightedLoss",
    "adversarial",
    "control",
    "curvature",
    "data",
    "distributed",
    "dual_batch",
    "elastic",
    "integrations",
    "keep_freed_memory",
    "models",
    "monitor",
    "normalisation",
    "optim",
    "planning",
    "plots",
    "runs",
    "training",
]

_CLASSES = {
    "AdaptiveBatchTrainer": "hessianflow.training.trainer",
    "History": "hessianflow.runs.history",
    "ModelLoss": "hessianflow.losses",
    "WeightedLoss": "hessianflow.losses",
    "monitor": "hessianflow.monitoring",
    **dict.fromkeys(
        ("CurvatureReading", "Decision", "HessianFlowError", "Progress"), "hessianflow.interfaces"
    ),
}


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(import_module(_CLASSES[name]), name)
    if name in __all__:
        return import_module(f"hessianflow.{name}")
    raise AttributeError(f"module 'hessianflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
