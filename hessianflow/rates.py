"""Learning rates of optimizers other than SGD, and how they follow the batch."""

from collections.abc import Mapping

ADAPTIVE = ("adam", "adamw", "lamb")
"""Optimizers that divide by the size of the gradients: their noise follows rate over the root of
the batch, so that a rate scales with the root (Malladi et al., arXiv:2205.10287)."""

RATES: Mapping[str, Mapping[str, float]] = {
    "adam": {"all": 1e-3},
    "adamw": {"all": 1e-3},
    "lars": {"digits": 1.0},
    "clars": {"digits": 0.1},
    "lamb": {"digits": 0.003},
}
"""Rates of optimizers other than SGD, by data set or for all; presets of data sets have those of
SGD.

Adam's is the default of Kingma and Ba, arXiv:1412.6980, section 2. Those on digits were measured:
30 epochs of `hessianflow train --optimizer NAME --lr RATE`, seeds 0 and 1 (lamb: 2 too), test
accuracy in %: adam and adamw 98.3 98.6; lars 98.3 98.1 at 0.3, 98.1 98.3 at 1, 98.6 98.1 at 3,
diverged at 10; clars 98.9 97.8 at 0.1 and at 0.3, diverged at 1; lamb 98.6 98.3 98.9 at 0.003, 99.4
97.8 98.9 at 0.01.
"""
