"""`python -m experiments.conadv`."""

import sys

from experiments.conadv.run import STUDY
from experiments.runner import main

sys.exit(main(STUDY))
