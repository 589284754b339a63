"""Batch normalisation in its forms, and tests of whether its statistics can be trusted.

There is one file for each form: ghost batches in training, fixed statistics in an attack, layers
folded into convolutions, separate statistics for adversarial examples, statistics measured again.
"""

from hessianflow.normalisation.recalibrate import recalibrate
from hessianflow.normalisation.split import clean_rows, is_split, merge_batch_norm, split_batch_norm

__all__ = ["clean_rows", "is_split", "merge_batch_norm", "recalibrate", "split_batch_norm"]
