"""`python -m experiments.squeezenext`."""

import sys

from experiments.runner import main
from experiments.squeezenext.run import STUDY

sys.exit(main(STUDY))
