"""Do small batches on some workers pay?"""

from pathlib import Path

from experiments.dual_batch.grid import cells
from experiments.runner import RUNS, Study

STUDY = Study("dual_batch", RUNS / "dual_batch", cells, recorded=Path(__file__).parent)
