"""Does CLARS need no warm-up? `python -m experiments.lars_clars`, or this file."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parents[1]))

from experiments.lars_clars.figure import draw  # noqa: E402
from experiments.lars_clars.grid import cells  # noqa: E402
from experiments.runner import RUNS, Study, main  # noqa: E402

STUDY = Study("lars_clars", RUNS / "lars_clars", cells, draw, recorded=FOLDER)

if __name__ == "__main__":
    sys.exit(main(STUDY))
