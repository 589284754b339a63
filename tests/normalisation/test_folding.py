"""Oracle: the layers one by one, in float64: outputs, and derivatives by inputs and parameters."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hessianflow.adversarial import fgsm
from hessianflow.curvature import HessianOperator
from hessianflow.normalisation.folded import FoldedSequence, folded_normalisation


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
    [
        {},
        {"bias": False},
        {"groups": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": "same"},
        {"stride": 2},
    ],
    ids=str,
)
def test_a_folded_convolution_gives_what_the_two_give(options):
    model = trained_block(options)
    inputs = torch.randn(3, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    expected = model(inputs)
    [slope] = torch.autograd.grad(expected.square().sum(), inputs)
    kinds = [type(layer) for layer in model.modules()]
    with folded_normalisation(model) as folded:
        assert [type(layer).__name__ for layer in folded.children()] == [
            "FoldedSequence",
            "Conv2d",
            "BatchNorm2d",
        ]
        found = folded(inputs)
        [gradient] = torch.autograd.grad(found.square().sum(), inputs)
        # Its layers one by one are what they were.
        torch.testing.assert_close(
            model.body[1](model.body[0](inputs)), nn.Sequential(*model.body[:2])(inputs)
        )
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


@pytest.mark.parametrize(
    "change", [with_hook, with_own_order, with_own_forward, with_normalised_weights]
)
def test_what_somebody_looks_at_or_runs_otherwise_is_not_folded(change):
    model, inputs = trained_block(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    change(model)
    expected = model(inputs)
    with folded_normalisation(model) as folded:
        assert not isinstance(folded.body, FoldedSequence)
        torch.testing.assert_close(folded(inputs), expected, rtol=1e-12, atol=1e-12)


def test_a_sequence_in_training_mode_is_not_folded():
    model = trained_block()
    model.body[1].train()
    with folded_normalisation(model):
        assert type(model.body) is nn.Sequential


def test_a_shared_sequence_is_folded_in_all_places():
    block = trained_block()
    model = nn.ModuleDict({"first": block.body, "second": nn.Sequential(block.body)})
    with folded_normalisation(model):
        assert type(model["first"]) is type(model["second"][0]) is FoldedSequence
    assert type(model["first"]) is type(model["second"][0]) is nn.Sequential


def test_folded_under_autocast_is_as_near_as_16_bits_allow():
    model, inputs = trained_block().float(), torch.randn(3, 2, 6, 6)
    expected = model(inputs)
    with folded_normalisation(model), torch.autocast("cpu", torch.bfloat16):
        found = model(inputs)
    assert found.dtype == torch.bfloat16
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(
        found.float(), expected, rtol=0, atol=8 * torch.finfo(torch.bfloat16).eps * scale
    )


def test_derivatives_by_parameters_are_those_of_the_layers():
    """First and second: a random direction's slope along the gradient."""
    model, inputs = trained_block(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    parameters = list(model.parameters())

    def derivatives():
        first = torch.autograd.grad(model(inputs).sin().sum(), parameters, create_graph=True)
        source = torch.Generator().manual_seed(0)
        directions = [torch.randn(p.shape, dtype=p.dtype, generator=source) for p in parameters]
        return first, torch.autograd.grad(first, parameters, directions)

    expected = derivatives()
    with folded_normalisation(model):
        found = derivatives()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"affine": False}, {"eps": 0.5}])
def test_a_sequence_may_be_the_model_itself(options):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4, **options)
    nn.init.uniform_(norm.running_mean)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), norm, nn.Tanh()).double().eval()
    inputs = torch.randn(3, 2, 6, dtype=torch.float64)
    with folded_normalisation(model) as folded:
        assert folded is not model
        torch.testing.assert_close(folded(inputs), model(inputs), rtol=1e-12, atol=1e-12)
        assert list(folded.parameters()) == list(model.parameters())


class Own(nn.Sequential):
    def twice(self, x):
        return 2 * self(x)


def test_a_class_of_its_own_keeps_its_type_and_methods():
    torch.manual_seed(0)
    model, inputs = (
        Own(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)).double().eval(),
        torch.randn(3, 2, 6).double(),
    )
    expected = model.twice(inputs)
    with folded_normalisation(model) as folded:
        assert isinstance(folded, Own)
        assert isinstance(folded, FoldedSequence)
        torch.testing.assert_close(folded.twice(inputs), expected)


class Sliced(nn.Module):
    """Runs its sequence in two halves; the cut is between a convolution and its normalisation, or
    behind them."""

    def __init__(self, kind, cut):
        super().__init__()
        self.body = kind(
            nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Tanh(), nn.Conv1d(4, 2, 3), nn.BatchNorm1d(2)
        )
        self.cut = cut

    def forward(self, x):
        return self.body[self.cut :](self.body[: self.cut](x)).sum(-1)


@pytest.mark.parametrize("kind", [nn.Sequential, Own])
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_sequence_may_be_sliced(kind, cut):
    torch.manual_seed(0)
    model, inputs = Sliced(kind, cut).double().eval(), torch.randn(3, 2, 6).double()
    for norm in (model.body[1], model.body[4]):
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    expected = model(inputs)
    with folded_normalisation(model):
        assert isinstance(model.body, FoldedSequence)
        assert isinstance(model.body[:cut], kind)
        torch.testing.assert_close(model(inputs), expected, rtol=1e-12, atol=1e-12)
    check_attack_and_product(model, inputs)


def check_attack_and_product(model, inputs, reference=None):
    """Against the sign of the gradient and differences of gradients, of the layers as they are."""
    reference, targets = reference or model, torch.tensor([0, 1, 1])
    leaf = inputs.clone().requires_grad_()
    [slope] = torch.autograd.grad(F.cross_entropy(reference(leaf), targets), leaf)
    found = fgsm(model, inputs, targets, 0.125, value_range=None)
    torch.testing.assert_close(found, inputs + 0.125 * slope.sign())

    parameters = list(reference.parameters())
    direction = [torch.randn_like(p) for p in parameters]
    slopes = []
    for step in (1e-5, -2e-5, 1e-5):  # ahead, behind, back
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=step)
        slopes.append(
            flat(torch.autograd.grad(F.cross_entropy(reference(inputs), targets), parameters))
        )
    product = HessianOperator(model, F.cross_entropy, (inputs, targets)).matvec(flat(direction))
    torch.testing.assert_close(product, (slopes[0] - slopes[1]) / 2e-5, rtol=1e-6, atol=1e-7)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", ["script", "trace"])
def test_a_compiled_model_may_be_attacked_and_measured(way):
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)
    )
    layers, inputs = layers.double().eval(), torch.randn(3, 2, 6).double()
    model = torch.jit.script(layers) if way == "script" else torch.jit.trace(layers, inputs)
    check_attack_and_product(model, inputs, layers)


def test_a_checkpointed_sequence_is_run_layer_by_layer():
    """Its graph is built again in the backward pass, when it may be back in its plain form."""
    model, inputs = trained_block(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    parameters = list(model.body.parameters())
    expected = torch.autograd.grad(model.body(inputs).square().sum(), parameters)
    with folded_normalisation(model):
        outputs = checkpoint(lambda x: model.body(x), inputs, use_reentrant=False)
    found = torch.autograd.grad(outputs.square().sum(), parameters)
    torch.testing.assert_close(found, expected)
