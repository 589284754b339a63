"""Does ABSA save updates on CIFAR? `python -m experiments.absa_cifar`, or this file."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parents[1]))

from experiments.absa_cifar.grid import cells  # noqa: E402
from experiments.runner import RUNS, Study, main  # noqa: E402

STUDY = Study("absa_cifar", RUNS / "absa_cifar", cells, recorded=FOLDER)

if __name__ == "__main__":
    sys.exit(main(STUDY))
