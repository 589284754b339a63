"""Ranks take turns at the batches of one loader; loaders of their own would be counted in part, and
twice.

The oracle is the loss over all data in one process.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from hessianflow import HessianFlowError
from hessianflow.distributed import run_simulated
from hessianflow.training import evaluate
from hessianflow.training.evaluate import fingerprint

DATA = TensorDataset(
    torch.randn(10, 4, generator=torch.Generator().manual_seed(0)),
    torch.randint(3, (10,), generator=torch.Generator().manual_seed(1)),
)


def net() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def measured(reducer: Any, loaders: list[Any]) -> float:
    model = nn.Linear(4, 3)
    model.load_state_dict(WEIGHTS)
    return evaluate(model, loaders[reducer.rank], cross_entropy, reducer=reducer).loss


WEIGHTS = net().state_dict()


@pytest.mark.parametrize("size", [3, 10])
def test_the_same_loader_on_all_ranks(size):
    expected = cross_entropy(net()(DATA.tensors[0]), DATA.tensors[1]).item()
    found = run_simulated(measured, 3, [DataLoader(DATA, size) for _ in range(3)])
    assert found == pytest.approx([expected] * 3, rel=1e-6)


def test_a_distributed_sampler_is_refused():
    loaders = [
        DataLoader(DATA, 3, sampler=DistributedSampler(DATA, 3, rank, shuffle=False))
        for rank in range(3)
    ]
    with pytest.raises(HessianFlowError, match="the evaluation data differ between ranks"):
        run_simulated(measured, 3, loaders)


def test_a_shuffled_loader_is_refused():
    sources = [torch.Generator().manual_seed(seed) for seed in range(3)]
    loaders = [DataLoader(DATA, 3, shuffle=True, generator=source) for source in sources]
    with pytest.raises(HessianFlowError, match="the evaluation data differ between ranks"):
        run_simulated(measured, 3, loaders)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
)
def test_fingerprints_tell_values_apart(dtype):
    zeros, ones = torch.zeros(4, 3).to(dtype), torch.ones(4, 3).to(dtype)
    assert fingerprint({"x": zeros, "y": [ones[0]]}) == fingerprint(
        {"x": zeros.clone(), "y": [ones[1]]}
    )
    assert fingerprint({"x": zeros, "y": [ones[0]]}) != fingerprint({"x": ones, "y": [ones[0]]})
    assert fingerprint(torch.tensor(1.0)) != fingerprint(torch.tensor(2.0))
