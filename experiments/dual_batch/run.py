"""Do small batches on some workers pay? Run as `python -m experiments.dual_batch`, or as a file."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parents[1]))

from experiments.dual_batch.grid import cells  # noqa: E402
from experiments.runner import RUNS, Study, main  # noqa: E402

STUDY = Study("dual_batch", RUNS / "dual_batch", cells, recorded=FOLDER)

if __name__ == "__main__":
    sys.exit(main(STUDY))
