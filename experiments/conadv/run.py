"""What do adversarial examples buy, and what do they cost? `python -m experiments.conadv`, or this
file."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parents[1]))

from experiments.conadv.grid import cells  # noqa: E402
from experiments.conadv.table import report  # noqa: E402
from experiments.runner import RUNS, Study, main  # noqa: E402

STUDY = Study("conadv", RUNS / "conadv", cells, report, recorded=FOLDER)

if __name__ == "__main__":
    sys.exit(main(STUDY))
