"""The records of a run: one reader, one recorder, and the form of every row and file.

Training, plots, commands and experiments read and write run directories through this package. It
imports none of them.
"""

from hessianflow.runs.history import History
from hessianflow.runs.recorder import Recorder
from hessianflow.runs.sinks import LogSink, TensorBoardSink
from hessianflow.runs.trackers import MLflowSink, WandbSink

__all__ = ["History", "LogSink", "MLflowSink", "Recorder", "TensorBoardSink", "WandbSink"]
