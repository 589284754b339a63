"""SqueezeNext in pytorchcv's style is pytorchcv's network: the same outputs and gradients for the
same weights."""

import pytest
import torch
from peers import library

from experiments.benchmarks.models import PAIRS, networks


@pytest.mark.parametrize(("theirs", "ours"), PAIRS.items())
def test_same_outputs_and_gradients(theirs: str, ours: str) -> None:
    """In float64 and training mode, so that batch statistics and every rounding are the same
    operations."""
    library("pytorchcv")
    torch.manual_seed(0)
    models = networks(theirs, ours, 64)
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    results = []
    for name in ("pytorchcv", "ours"):
        outputs = models[name].double().train()(images)
        (stem, *_), loss = models[name].parameters(), outputs.square().mean()
        results.append((outputs.detach(), torch.autograd.grad(loss, stem)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)
