"""`python -m experiments.spectra`."""

import sys

from experiments.runner import main
from experiments.spectra.run import STUDY

sys.exit(main(STUDY))
