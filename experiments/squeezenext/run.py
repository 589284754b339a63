"""Does ABSA save updates on SqueezeNext? `python -m experiments.squeezenext`, or this file."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parents[1]))

from experiments.runner import RUNS, Study, main  # noqa: E402
from experiments.squeezenext.grid import cells  # noqa: E402

STUDY = Study("squeezenext", RUNS / "squeezenext", cells, recorded=FOLDER)

if __name__ == "__main__":
    sys.exit(main(STUDY))
