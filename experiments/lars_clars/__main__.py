"""`python -m experiments.lars_clars`."""

import sys

from experiments.lars_clars.run import STUDY
from experiments.runner import main

sys.exit(main(STUDY))
