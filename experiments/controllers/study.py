"""Who decides the batch size best?"""

from pathlib import Path

from experiments.controllers.grid import cells
from experiments.controllers.report import report
from experiments.runner import RUNS, Study

STUDY = Study(
    "controllers", RUNS / "controllers", cells, draw=report, recorded=Path(__file__).parent
)
