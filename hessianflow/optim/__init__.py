"""Large-batch optimizers, their schedules, and the gradient observers that feed them and the
controllers."""

from hessianflow.optim.clars import (
    CLARS,
    NormEstimator,
)
from hessianflow.optim.extrapolation import (
    Extrapolation,
)
from hessianflow.optim.lamb import (
    LAMB,
)
from hessianflow.optim.lars import (
    LARS,
)
from hessianflow.optim.observers import (
    ExtraBatchNorms,
    GradientMoments,
    MicrobatchNorms,
)
from hessianflow.optim.sam import (
    SAM,
    sam_perturbation,
)
from hessianflow.optim.schedules import (
    RateAndWarmup,
    cooldown,
    lars_recipe,
    legw,
    linear_warmup,
    polynomial_decay,
)

__all__ = [
    "CLARS",
    "LAMB",
    "LARS",
    "SAM",
    "ExtraBatchNorms",
    "Extrapolation",
    "GradientMoments",
    "MicrobatchNorms",
    "NormEstimator",
    "RateAndWarmup",
    "cooldown",
    "lars_recipe",
    "legw",
    "linear_warmup",
    "polynomial_decay",
    "sam_perturbation",
]
