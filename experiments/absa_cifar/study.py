"""Does ABSA save updates on CIFAR?"""

from pathlib import Path

from experiments.absa_cifar.grid import cells
from experiments.runner import RUNS, Study

STUDY = Study("absa_cifar", RUNS / "absa_cifar", cells, recorded=Path(__file__).parent)
