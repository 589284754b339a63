"""How does the spectrum change through training?"""

from pathlib import Path

from experiments.runner import RUNS, Study
from experiments.spectra.figure import draw
from experiments.spectra.grid import cells

STUDY = Study("spectra", RUNS / "spectra", cells, draw, recorded=Path(__file__).parent)
