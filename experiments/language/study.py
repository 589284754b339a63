"""How few updates does a language model need?"""

from pathlib import Path

from experiments.language.grid import cells
from experiments.language.report import report
from experiments.runner import RUNS, Study

STUDY = Study("language", RUNS / "language", cells, draw=report, recorded=Path(__file__).parent)
