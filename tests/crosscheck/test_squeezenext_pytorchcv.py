"""SqueezeNext in pytorchcv's style is pytorchcv's network: the same outputs and gradients for the
same weights."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "pytorchcv", reason="pytorchcv is not installed: pip install --no-deps pytorchcv"
)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.benchmarks.models import PAIRS, networks


@pytest.mark.parametrize(("theirs", "ours"), PAIRS.items())
def test_same_outputs_and_gradients(theirs: str, ours: str) -> None:
    """In float64 and training mode, so that batch statistics and every rounding are the same
    operations."""
    torch.manual_seed(0)
    models = networks(theirs, ours, 64)
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    results = []
    for name in ("pytorchcv", "ours"):
        outputs = models[name].double().train()(images)
        (stem, *_), loss = models[name].parameters(), outputs.square().mean()
        results.append((outputs.detach(), torch.autograd.grad(loss, stem)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)
