"""What do adversarial examples buy, and what do they cost?"""

from pathlib import Path

from experiments.conadv.grid import cells
from experiments.conadv.table import report
from experiments.runner import RUNS, Study

STUDY = Study("conadv", RUNS / "conadv", cells, report, recorded=Path(__file__).parent)
