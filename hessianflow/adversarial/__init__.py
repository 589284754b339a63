"""Adversarial examples: attacks, training plug-ins, and what measures and stabilises them."""

from hessianflow.adversarial.adversaries import FGSM, PGD
from hessianflow.adversarial.attacks import fgsm, pgd
from hessianflow.adversarial.mixing import perturbed_rows

__all__ = ["FGSM", "PGD", "fgsm", "perturbed_rows", "pgd"]
