"""What a run leaves behind: one reader, one recorder, and the form of every row and file.

This room stands on the ground floor: training, plots, commands and experiments read and write run
directories through it, and it knows none of them.
"""

from hessianflow.runs.history import History
from hessianflow.runs.recorder import Recorder
from hessianflow.runs.sinks import LogSink, TensorBoardSink

__all__ = ["History", "LogSink", "Recorder", "TensorBoardSink"]
