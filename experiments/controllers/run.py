"""Who decides the batch size best? `python experiments/controllers/run.py`, or `python -m
experiments.controllers`."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parents[1]))

from experiments.controllers.grid import cells  # noqa: E402
from experiments.runner import RUNS, Study, main  # noqa: E402

STUDY = Study("controllers", RUNS / "controllers", cells, recorded=FOLDER)

if __name__ == "__main__":
    sys.exit(main(STUDY))
