"""Does ABSA save updates on SqueezeNext?"""

from pathlib import Path

from experiments.runner import RUNS, Study
from experiments.squeezenext.grid import cells

STUDY = Study("squeezenext", RUNS / "squeezenext", cells, recorded=Path(__file__).parent)
