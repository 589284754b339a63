"""Measuring leaves no trace: every piece of state is compared before and after, also when the body
raises."""

import copy
import random

import numpy as np
import pytest
import torch
from problems import conv_net
from torch import nn

from hessianflow.measuring import measuring, unwrap


class Recorder(nn.Module):
    """Dropout, batch normalisation, a frozen weight and a child left in another mode than its
    parent."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_net()
        self.drop = nn.Dropout(0.5)
        self.body[0].weight.requires_grad_(False)
        self.body[1].eval()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.drop(self.body(inputs))


def snapshot(model: nn.Module) -> dict:
    return {
        "modes": [m.training for m in model.modules()],
        "tracks": [getattr(m, "track_running_stats", None) for m in model.modules()],
        "buffers": copy.deepcopy(dict(model.named_buffers())),
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
    }


def same(first: dict, second: dict) -> bool:
    plain = all(
        first[key] == second[key] for key in ("modes", "tracks", "flags", "numpy", "python")
    )
    buffers = all(
        torch.equal(first["buffers"][name], second["buffers"][name]) for name in first["buffers"]
    )
    grads = all(
        (a is None) == (b is None) for a, b in zip(first["grads"], second["grads"], strict=True)
    )
    return plain and buffers and grads and torch.equal(first["torch"], second["torch"])


@pytest.mark.parametrize("norm_mode", ["eval", "batch"])
@pytest.mark.parametrize("raises", [False, True])
def test_everything_is_put_back(norm_mode, raises):
    model = Recorder().train()
    model.body[1].eval()
    model.body[1].weight.grad = torch.ones(4, dtype=torch.float64)
    before = snapshot(model)
    try:
        with measuring(model, norm_mode) as inner:
            torch.rand(3), np.random.rand(3), random.random()
            for parameter in inner.parameters():
                parameter.requires_grad_(False)
            inner.body[1].running_mean.add_(1)
            inner(torch.randn(4, 1, 8, 8).double())
            if raises:
                raise KeyError("in the body")
    except KeyError:
        assert raises
    assert same(before, snapshot(model))


def test_eval_uses_running_and_batch_uses_batch_statistics():
    model, inputs = conv_net().train(), torch.randn(6, 1, 8, 8).double()
    with measuring(model, "eval") as inner:
        by_running = inner(inputs)
    with measuring(model, "batch") as inner:
        by_batch = inner(inputs)
    assert torch.equal(by_running, copy.deepcopy(model).eval()(inputs))
    assert torch.equal(by_batch, copy.deepcopy(model).train()(inputs))
    assert not torch.allclose(by_running, by_batch)


def test_gradients_are_on_inside_whatever_is_outside():
    model, inputs = conv_net(), torch.randn(2, 1, 8, 8).double()
    with torch.no_grad(), measuring(model) as inner:
        assert inner(inputs).requires_grad
    with torch.inference_mode(), measuring(model) as inner:
        assert inner(inputs.clone()).requires_grad


def test_a_buffer_made_in_inference_mode_is_no_obstacle():
    model = nn.Linear(2, 2)
    with torch.inference_mode():
        model.register_buffer("table", torch.ones(2))
    with measuring(model) as inner:
        inner(torch.ones(1, 2))
    assert torch.equal(model.table, torch.ones(2))


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning"
)  # torch's own, on its first compile
def test_wrappers_are_looked_through_however_nested():
    model = nn.Linear(2, 2)
    assert unwrap(nn.DataParallel(torch.compile(model))) is model
    assert unwrap(model) is model


def test_buffers_that_were_none_replaced_or_added_are_as_found():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].register_buffer("cache", None)
    mean, flag = model[1].running_mean, torch.tensor([True, False])
    model[0].register_buffer("flag", flag)
    with measuring(model) as inner:
        inner[0].cache = torch.ones(3)
        inner[0].register_buffer("late", torch.ones(1))
        del inner[1].num_batches_tracked
        inner[1].running_mean = torch.ones(2)
        inner[0].flag.logical_not_()
    assert model[0].cache is None
    assert "late" not in model[0]._buffers
    assert model[1].running_mean is mean
    assert int(model[1].num_batches_tracked) == 0
    assert flag.tolist() == [True, False]


def test_a_buffer_nobody_wrote_to_keeps_its_version():
    """Restoring it would invalidate every graph that saved it, such as one kept for further
    products."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    before = [buffer._version for buffer in model.buffers()]
    with measuring(model) as inner:
        inner[1].running_var.add_(1)
    after = [buffer._version for buffer in model.buffers()]
    assert [a == b for a, b in zip(before, after, strict=True)] == [
        True,
        True,
        True,
        True,
        False,
        True,
    ]
    assert model[1].running_var.tolist() == [1.0, 1.0]


def test_a_sparse_buffer_is_put_back():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.eye(2).to_sparse())
    with measuring(model) as inner:
        inner.mask.mul_(3)
    assert torch.equal(model.mask.to_dense(), torch.eye(2))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_modules_are_measured_too():
    model = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))).train()
    with measuring(model) as inner:
        assert not inner.training
        assert torch.equal(inner(torch.ones(1, 2)), inner(torch.ones(1, 2)))
    assert all(module.training for module in model.modules())
