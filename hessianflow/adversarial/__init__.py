"""Adversarial examples: attacks, training plug-ins, and what measures and stabilises them."""

from hessianflow.adversarial.adversaries import (
    FGSM,
    PGD,
)
from hessianflow.adversarial.attacks import (
    fgsm,
    pgd,
)
from hessianflow.adversarial.concurrent import (
    ConcurrentAdversary,
)
from hessianflow.adversarial.input_hessian import (
    InputHessian,
)
from hessianflow.adversarial.mixing import (
    perturbed_rows,
)
from hessianflow.adversarial.monitors import (
    InputCurvature,
    RobustnessWatch,
)
from hessianflow.adversarial.reuse import (
    GradientReuse,
)
from hessianflow.adversarial.robustness import (
    OverfittingAlarm,
    RobustAccuracy,
    robust_accuracy,
    wilson_interval,
)
from hessianflow.adversarial.runners import (
    AttackRunner,
    Interleaved,
    SecondStream,
)
from hessianflow.adversarial.worker import (
    WorkerProcess,
)

__all__ = [
    "FGSM",
    "PGD",
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
