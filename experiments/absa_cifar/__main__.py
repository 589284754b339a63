"""`python -m experiments.absa_cifar`."""

import sys

from experiments.absa_cifar.run import STUDY
from experiments.runner import main

sys.exit(main(STUDY))
