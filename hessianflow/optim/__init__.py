"""Optimizers for large batches, schedules, and observers of gradients."""

from collections.abc import Mapping

from torch.optim import SGD, Adam, AdamW

from hessianflow.optim.clars import CLARS, NormEstimator
from hessianflow.optim.extrapolation import Extrapolation
from hessianflow.optim.lamb import LAMB
from hessianflow.optim.lars import LARS
from hessianflow.optim.moments import GradientMoments
from hessianflow.optim.muon import Muon
from hessianflow.optim.muon_groups import muon_groups
from hessianflow.optim.observers import ExtraBatchNorms, MicrobatchNorms
from hessianflow.optim.rate_schedules import Constant, Cooldown, Cosine, MultiStep, Polynomial
from hessianflow.optim.sam import SAM, sam_perturbation
from hessianflow.optim.schedules import cooldown, polynomial_decay

__all__ = [
    "CLARS",
    "LAMB",
    "LARS",
    "OPTIMIZERS",
    "SAM",
    "SCHEDULES",
    "Constant",
    "Cooldown",
    "Cosine",
    "ExtraBatchNorms",
    "Extrapolation",
    "GradientMoments",
    "MicrobatchNorms",
    "MultiStep",
    "Muon",
    "NormEstimator",
    "Polynomial",
    "cooldown",
    "muon_groups",
    "polynomial_decay",
    "sam_perturbation",
]

OPTIMIZERS: Mapping[str, type] = {
    "sgd": SGD,
    "adam": Adam,
    "adamw": AdamW,
    "lars": LARS,
    "clars": CLARS,
    "lamb": LAMB,
    "muon": Muon,
    "sam": SAM,
    "extrapolation": Extrapolation,
}
"""Every optimizer by the name that the command gives it, those of torch among them."""
SCHEDULES: Mapping[str, type] = {
    "constant": Constant,
    "multistep": MultiStep,
    "cosine": Cosine,
    "polynomial": Polynomial,
    "cooldown": Cooldown,
}
"""Every course of the learning rate by the name that the command gives it."""
