"""The training loop, its settings, and its records and checkpoints."""

from hessianflow.runs import History, LogSink, MLflowSink, TensorBoardSink, WandbSink
from hessianflow.training.best import Best
from hessianflow.training.divergence import Divergence
from hessianflow.training.evaluate import Evaluation, evaluate
from hessianflow.training.exposing import Ahead, exposed_loss
from hessianflow.training.extent import Every
from hessianflow.training.metrics import Metrics
from hessianflow.training.progressive import ProgressiveResize, check_resolutions
from hessianflow.training.reporting import Reporting
from hessianflow.training.saving import Checkpoints
from hessianflow.training.schedule import Schedule
from hessianflow.training.task import AfterEpoch, Passes
from hessianflow.training.trainer import AdaptiveBatchTrainer

__all__ = [
    "AdaptiveBatchTrainer",
    "AfterEpoch",
    "Ahead",
    "Best",
    "Checkpoints",
    "Divergence",
    "Evaluation",
    "Every",
    "History",
    "LogSink",
    "MLflowSink",
    "Metrics",
    "Passes",
    "ProgressiveResize",
    "Reporting",
    "Schedule",
    "TensorBoardSink",
    "WandbSink",
    "check_resolutions",
    "evaluate",
    "exposed_loss",
]
