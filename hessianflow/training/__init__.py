"""The training loop and what it leaves behind."""

from hessianflow.training.evaluate import Evaluation, evaluate
from hessianflow.training.progressive import ProgressiveResize, check_resolutions
from hessianflow.training.recalibrate import recalibrate
from hessianflow.training.record import History, RunRecord
from hessianflow.training.sinks import LogSink, TensorBoardSink
from hessianflow.training.trainer import AdaptiveBatchTrainer

__all__ = [
    "AdaptiveBatchTrainer",
    "Evaluation",
    "History",
    "LogSink",
    "ProgressiveResize",
    "RunRecord",
    "TensorBoardSink",
    "check_resolutions",
    "evaluate",
    "recalibrate",
]
