"""Batch-size controllers: deterministic state machines without tensors; measurements in, a decision out."""

from hessianflow.control.absa import ABSA
from hessianflow.control.cabs import CABS
from hessianflow.control.diversity import DiveBatch
from hessianflow.control.lr_scaling import lr_factor, momentum_correction
from hessianflow.control.noise_scale import NoiseScale
from hessianflow.control.schedules import AdaBatch, FixedBatch, GrowInsteadOfDecay, Warmup

__all__ = [
    "ABSA",
    "CABS",
    "AdaBatch",
    "DiveBatch",
    "FixedBatch",
    "GrowInsteadOfDecay",
    "NoiseScale",
    "Warmup",
    "lr_factor",
    "momentum_correction",
]
