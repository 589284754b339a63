"""The training loop and what it leaves behind."""

from hessianflow.runs import (
    History,
    LogSink,
    TensorBoardSink,
)
from hessianflow.training.evaluate import (
    Evaluation,
    evaluate,
)
from hessianflow.training.exposing import (
    Ahead,
    exposed_loss,
)
from hessianflow.training.progressive import (
    ProgressiveResize,
    check_resolutions,
)
from hessianflow.training.trainer import (
    AdaptiveBatchTrainer,
)

__all__ = [
    "AdaptiveBatchTrainer",
    "Ahead",
    "Evaluation",
    "History",
    "LogSink",
    "ProgressiveResize",
    "TensorBoardSink",
    "check_resolutions",
    "evaluate",
    "exposed_loss",
]
