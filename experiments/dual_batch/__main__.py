"""`python -m experiments.dual_batch`."""

import sys

from experiments.dual_batch.run import STUDY
from experiments.runner import main

sys.exit(main(STUDY))
