"""`python -m experiments.controllers`."""

import sys

from experiments.controllers.run import STUDY
from experiments.runner import main

sys.exit(main(STUDY))
