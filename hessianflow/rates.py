"""Learning rates of optimizers other than SGD, and the optimizers whose rate follows the root of
the batch."""

from collections.abc import Mapping

ADAPTIVE = ("adam", "adamw", "lamb", "muon")
"""Optimizers that divide by the size of the gradients. Their noise follows the rate over the root
of the batch, so the rate scales with the root (Malladi et al., arXiv:2205.10287, for Adam)."""

RATES: Mapping[str, Mapping[str, float]] = {
    "adam": {"all": 1e-3},
    "adamw": {"all": 1e-3, "text": 4e-3, "python": 4e-3},
    "lars": {"digits": 1.0},
    "clars": {"digits": 0.1},
    "lamb": {"digits": 0.003},
    "muon": {"all": 0.24},
}
"""Rates by optimizer, and by data set or for "all"; presets of data sets have the rates of SGD.

The rate of Adam is the default of Kingma and Ba, arXiv:1412.6980, section 2; that of Muon is
the one of airbench (github.com/KellerJordan/cifar10-airbench) for weights that are renormalised.
The rate of AdamW on text was the best of 0.002, 0.004 and 0.008 for gpt-tiny in 192 updates of 16
blocks of 64 bytes; the held-out losses were 2.064, 1.959 and 2.001 nats (experiments/language).
Rates on digits come from 30 epochs of `hessianflow train --optimizer NAME --lr RATE` with seeds 0
and 1 (for lamb, 2 too). Test accuracy in %: adam and adamw 98.3 98.6; lars 98.3 98.1 at 0.3, 98.1
98.3 at 1, 98.6 98.1 at 3, diverged at 10; clars 98.9 97.8 at 0.1 and at 0.3, diverged at 1; lamb
98.6 98.3 98.9 at 0.003, 99.4 97.8 98.9 at 0.01.
"""
