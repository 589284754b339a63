"""Batch-size controllers: deterministic state machines without tensors; measurements in, a decision out."""

from hessianflow.control.absa import ABSA
from hessianflow.control.schedules import AdaBatch, FixedBatch, GrowInsteadOfDecay, Warmup

__all__ = ["ABSA", "AdaBatch", "FixedBatch", "GrowInsteadOfDecay", "Warmup"]
