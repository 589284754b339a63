"""Does CLARS need no warm-up?"""

from pathlib import Path

from experiments.lars_clars.figure import draw
from experiments.lars_clars.grid import cells
from experiments.runner import RUNS, Study

STUDY = Study("lars_clars", RUNS / "lars_clars", cells, draw, recorded=Path(__file__).parent)
