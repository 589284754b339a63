"""Oracle: torch's own batch normalisation in evaluation mode, in float64."""

import pytest
import torch
from torch import nn

from hessianflow.adversarial.attacks import attacking
from hessianflow.adversarial.fixed_norm import fixed_normalisation
from hessianflow.training.ghost_norm import ghost_normalisation


def network(affine: bool = True, tracks: bool = True) -> nn.Module:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(4, affine=affine, track_running_stats=tracks), nn.BatchNorm1d(5, eps=0.1)]
    for norm in norms:
        for tensor in (norm.running_var, norm.running_mean, norm.weight, norm.bias):
            if tensor is not None:
                nn.init.uniform_(tensor, 0.5, 2)
    return nn.Sequential(nn.Conv2d(2, 4, 3), norms[0], nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), norms[1]).double()


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
            assert type(frozen).__name__ == "_Folded"
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


class Block(nn.Module):
    """Its first pair may be folded; what is between the others is seen."""

    def __init__(self, options=None):
        super().__init__()
        convolution = nn.Conv2d(2, 4, 3, **(options or {}))
        self.body = nn.Sequential(convolution, nn.BatchNorm2d(4, eps=0.1), nn.ReLU(inplace=True))
        self.convolution, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        between = self.convolution(self.body(x))
        return self.norm(between) + between


def trained_block(options=None):
    torch.manual_seed(0)
    block = Block(options).double().eval()
    for tensor in block.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, -1, 1)
    for norm in (block.body[1], block.norm):
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return block


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"groups": 2}, {"padding": 1, "padding_mode": "reflect"}, {"padding": "same"}, {"stride": 2}],
    ids=str,
)
def test_a_folded_convolution_gives_what_the_two_give(options):
    model = trained_block(options)
    inputs = torch.randn(3, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    expected = model(inputs)
    [slope] = torch.autograd.grad(expected.square().sum(), inputs)
    kinds = [type(layer) for layer in model.modules()]
    with fixed_normalisation(model) as fixed:
        assert [type(layer).__name__ for layer in fixed.children()] == ["_Folded", "Conv2d", "_Fixed"]
        found = fixed(inputs)
        [gradient] = torch.autograd.grad(found.square().sum(), inputs)
        # Its layers one by one are what they were.
        torch.testing.assert_close(model.body[1](model.body[0](inputs)), nn.Sequential(*model.body[:2])(inputs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-12)
    assert [type(layer) for layer in model.modules()] == kinds


class Skipping(nn.Sequential):
    def forward(self, x):
        return self[2](self[0](x))


def with_hook(block):
    block.body[0].register_forward_hook(lambda module, args, output: None)


def with_own_order(block):
    block.body = Skipping(*block.body)


def with_own_forward(block):
    block.body[0].forward = lambda x: x.repeat(1, 2, 1, 1)


def with_normalised_weights(block):
    block.body[0] = nn.utils.parametrizations.weight_norm(block.body[0])


@pytest.mark.parametrize("change", [with_hook, with_own_order, with_own_forward, with_normalised_weights])
def test_what_somebody_looks_at_or_runs_otherwise_is_not_folded(change):
    model, inputs = trained_block(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    change(model)
    expected = model(inputs)
    with fixed_normalisation(model) as fixed:
        assert type(fixed.body).__name__ != "_Folded"
        torch.testing.assert_close(fixed(inputs), expected, rtol=1e-12, atol=1e-12)


def test_a_sequence_in_training_mode_is_not_folded():
    model = trained_block()
    model.body[1].train()
    with fixed_normalisation(model):
        assert type(model.body) is nn.Sequential


def test_a_shared_sequence_is_folded_in_all_places():
    block = trained_block()
    model = nn.ModuleDict({"first": block.body, "second": nn.Sequential(block.body)})
    with fixed_normalisation(model):
        assert type(model["first"]).__name__ == type(model["second"][0]).__name__ == "_Folded"
    assert type(model["first"]) is type(model["second"][0]) is nn.Sequential


def test_folded_under_autocast_is_as_near_as_16_bits_allow():
    model, inputs = trained_block().float(), torch.randn(3, 2, 6, 6)
    expected = model(inputs)
    with fixed_normalisation(model), torch.autocast("cpu", torch.bfloat16):
        found = model(inputs)
    assert found.dtype == torch.bfloat16
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=8 * torch.finfo(torch.bfloat16).eps * scale)
