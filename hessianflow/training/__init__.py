"""The training loop and what it leaves behind."""

from hessianflow.training.evaluate import Evaluation, evaluate
from hessianflow.training.record import History, RunRecord
from hessianflow.training.sinks import LogSink, TensorBoardSink
from hessianflow.training.trainer import AdaptiveBatchTrainer

__all__ = ["AdaptiveBatchTrainer", "Evaluation", "History", "LogSink", "RunRecord", "TensorBoardSink", "evaluate"]
