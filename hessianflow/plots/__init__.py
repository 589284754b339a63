"""Figures, tables and reports from the records of runs, which are all that they read.

Functions that draw return a figure that is not bound to pyplot and that a notebook can show. If
`ax=` is given (`axes=` for figures of several axes), they draw into these axes and return the
figure that holds them. They raise a HessianFlowError if no run is given, a folder is not a run
directory, a file is damaged, or a path cannot be written.
"""

from hessianflow.plots.comparison import ComparisonTable, compare, compare_table
from hessianflow.plots.critical_batch import critical_batch
from hessianflow.plots.dual_batch import accuracy_over_time, batch_and_resolution, commit_timeline
from hessianflow.plots.edge_share import edge_share, has_edge_share
from hessianflow.plots.html import report
from hessianflow.plots.landscape import landscape
from hessianflow.plots.live import Live, live
from hessianflow.plots.robustness import robustness
from hessianflow.plots.scaling import scaling
from hessianflow.plots.spectra import spectral_density
from hessianflow.plots.training_curves import training_curves
from hessianflow.plots.trajectory import curvature_trajectory
from hessianflow.plots.workers import has_workers, workers

__all__ = [
    "ComparisonTable",
    "Live",
    "accuracy_over_time",
    "batch_and_resolution",
    "commit_timeline",
    "compare",
    "compare_table",
    "critical_batch",
    "curvature_trajectory",
    "edge_share",
    "has_edge_share",
    "has_workers",
    "landscape",
    "live",
    "report",
    "robustness",
    "scaling",
    "spectral_density",
    "training_curves",
    "workers",
]
