"""Batch normalisation: whose examples its statistics are of, and when they can be trusted.

One file for each form: ghost batches in training, statistics held fixed in a measurement, layers
folded into affine maps, statistics of their own for adversarial twins, statistics measured again.
"""

from hessianflow.normalisation.recalibrate import recalibrate
from hessianflow.normalisation.split import (
    clean_rows,
    is_split,
    merge_batch_norm,
    split_batch_norm,
)

__all__ = ["clean_rows", "is_split", "merge_batch_norm", "recalibrate", "split_batch_norm"]
