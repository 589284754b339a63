"""How does the spectrum change through training? `python -m experiments.spectra`, or this file."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parents[1]))

from experiments.runner import RUNS, Study, main  # noqa: E402
from experiments.spectra.figure import draw  # noqa: E402
from experiments.spectra.grid import cells  # noqa: E402

STUDY = Study("spectra", RUNS / "spectra", cells, draw, recorded=FOLDER)

if __name__ == "__main__":
    sys.exit(main(STUDY))
