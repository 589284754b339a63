"""Oracle: torch's own batch normalisation in evaluation mode, in float64."""

import pytest
import torch
from torch import nn

from hessianflow.adversarial.attacks import attacking
from hessianflow.normalisation.fixed import fixed_normalisation
from hessianflow.normalisation.folded import FoldedSequence
from hessianflow.normalisation.ghost import ghost_normalisation


def network(affine: bool = True, tracks: bool = True) -> nn.Module:
    torch.manual_seed(0)
    norms = [
        nn.BatchNorm2d(4, affine=affine, track_running_stats=tracks),
        nn.BatchNorm1d(5, eps=0.1),
    ]
    for norm in norms:
        for tensor in (norm.running_var, norm.running_mean, norm.weight, norm.bias):
            if tensor is not None:
                nn.init.uniform_(tensor, 0.5, 2)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), norms[0], nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), norms[1]
    ).double()


@pytest.mark.parametrize(("affine", "tracks"), [(True, True), (False, True), (True, False)])
def test_outputs_and_input_gradients_are_torchs(affine: bool, tracks: bool):
    model = network(affine, tracks).eval()
    inputs = torch.randn(6, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    outputs = model(inputs)
    [expected] = torch.autograd.grad(outputs.square().sum(), inputs)
    with fixed_normalisation(model) as fixed:
        found = fixed(inputs)
        [gradient] = torch.autograd.grad(found.square().sum(), inputs)
    torch.testing.assert_close(found, outputs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_layers_in_training_mode_and_foreign_ones_are_left_alone():
    class Own(nn.BatchNorm2d):
        def forward(self, input):
            return input

    model = nn.Sequential(nn.BatchNorm2d(2).train(), Own(2).eval(), nn.BatchNorm2d(2).eval())
    layers = list(model)
    with fixed_normalisation(model):
        assert [a is b for a, b in zip(model, layers, strict=True)] == [True, True, False]
    assert all(a is b for a, b in zip(model, layers, strict=True))


def test_layers_come_back_after_an_error():
    model = network().eval()
    layers = list(model)
    with pytest.raises(RuntimeError, match="shapes cannot be"), fixed_normalisation(model):
        model(torch.zeros(2, 2, 5, 5, dtype=torch.float64))
    assert all(a is b for a, b in zip(model, layers, strict=True))


def test_ghost_layers_of_a_training_run_are_plain_in_an_attack():
    model = network().train()
    with ghost_normalisation(model, 2):
        ghosts = model[1], model[5]
        with attacking(model, "eval") as frozen:
            assert isinstance(frozen, FoldedSequence)
            assert frozen.absorbed == {"1"}
            assert type(frozen[5]).__name__ == "_Fixed"
        assert (model[1], model[5]) == ghosts


def test_under_autocast_the_statistics_keep_their_precision():
    """bf16 inputs: the very kernel of torch, which computes in float32 inside."""
    model = network().float().eval()
    inputs = torch.randn(6, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(inputs)
        with fixed_normalisation(model):
            assert torch.equal(model(inputs), expected)


def test_attacks_use_it_and_see_hooks():
    model, calls = network().train(), []
    model[5].register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    layer = model[5]
    with attacking(model, "eval") as frozen:
        frozen(torch.zeros(2, 2, 4, 4, dtype=torch.float64))
    with attacking(model, "batch") as frozen:
        frozen(torch.randn(2, 2, 4, 4, dtype=torch.float64))
    assert calls == ["_Fixed", "BatchNorm1d"]
    assert model[5] is layer
    assert layer.training


def test_convolutions_and_their_normalisation_are_one():
    model = network().eval()
    with fixed_normalisation(model) as fixed:
        assert isinstance(fixed, FoldedSequence)
        assert isinstance(model[1], nn.BatchNorm2d)  # in no use, and not worth another form
        assert type(model[5]).__name__ == "_Fixed"
    assert type(model[5]) is nn.BatchNorm1d
