"""Adversarial attacks, adversaries that train on them, and measurements of what they do."""

from collections.abc import Mapping

from hessianflow.adversarial.adversaries import FGSM, PGD
from hessianflow.adversarial.attacks import fgsm, pgd
from hessianflow.adversarial.concurrent import ConcurrentAdversary
from hessianflow.adversarial.input_hessian import InputHessian
from hessianflow.adversarial.mixing import perturbed_rows
from hessianflow.adversarial.monitors import InputCurvature, RobustnessWatch
from hessianflow.adversarial.reuse import GradientReuse
from hessianflow.adversarial.robustness import (
    OverfittingAlarm,
    RobustAccuracy,
    robust_accuracy,
    wilson_interval,
)
from hessianflow.adversarial.runners import AttackRunner, Interleaved, SecondStream
from hessianflow.adversarial.worker import WorkerProcess

__all__ = [
    "ADVERSARIES",
    "ATTACKS",
    "FGSM",
    "PGD",
    "RUNNERS",
    "AttackRunner",
    "ConcurrentAdversary",
    "GradientReuse",
    "InputCurvature",
    "InputHessian",
    "Interleaved",
    "OverfittingAlarm",
    "RobustAccuracy",
    "RobustnessWatch",
    "SecondStream",
    "WorkerProcess",
    "fgsm",
    "perturbed_rows",
    "pgd",
    "robust_accuracy",
    "wilson_interval",
]

ATTACKS: Mapping[str, type] = {"fgsm": FGSM, "pgd": PGD}
"""Every attack by the name that the command gives it."""
ADVERSARIES: Mapping[str, type] = {
    **ATTACKS,
    "conadv": ConcurrentAdversary,
    "reuse": GradientReuse,
}
"""Every adversary by the name that the command gives it."""
RUNNERS: Mapping[str, type] = {
    "interleaved": Interleaved,
    "process": WorkerProcess,
    "stream": SecondStream,
}
"""Every place where attacks may run beside training, by the name that the command gives it."""
