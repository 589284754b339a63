"""Oracles: torch's own second derivatives of the same layers in float64, and finite differences
(gradgradcheck)."""

import pytest
import torch
from problems import classification, conv_net, initialised, mlp, train
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hessianflow.curvature import GGNOperator, HessianOperator
from hessianflow.curvature.double_backward import CheapDoubleBackward, has_replacements
from hessianflow.interfaces import HessianFlowError


def second_gradients(layer, x, mode):
    """The derivatives by everything of a random direction's slope along the gradient of a curved
    function."""
    torch.manual_seed(1)
    leaves = [x.clone().requires_grad_(), *layer.parameters()]
    with mode:
        output = layer(leaves[0])
        loss = (output.sin() * torch.randn_like(output)).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(first, leaves, [torch.randn(g.shape).to(g) for g in first])
    return output, first, second


CONVOLUTIONS = [
    (nn.Conv1d(2, 3, 3), (4, 2, 7)),
    (nn.Conv2d(2, 3, 3), (4, 2, 6, 5)),
    (nn.Conv2d(2, 3, (3, 1), stride=(2, 1), padding=(1, 0), bias=False), (4, 2, 6, 5)),
    (nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2), (3, 4, 5, 5)),
    (nn.Conv2d(3, 3, 3, padding=1, groups=3, padding_mode="circular"), (3, 3, 5, 5)),
    (nn.Conv2d(2, 3, 3, padding="same"), (2, 2, 5, 5)),
    (nn.Conv2d(2, 3, 3), (2, 5, 5)),
    (nn.Conv3d(2, 3, 2, stride=2), (2, 2, 4, 4, 5)),
    (nn.ConvTranspose2d(2, 3, 3), (2, 2, 4, 4)),
]
NORMALISATIONS = [
    (nn.BatchNorm1d(3), (5, 3)),
    (nn.BatchNorm2d(3, eps=0.1), (4, 3, 2, 2)),
    (nn.BatchNorm3d(2), (4, 2, 2, 1, 3)),
    (nn.BatchNorm2d(3, affine=False), (4, 3, 2, 2)),
    (nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 2)),
]


@pytest.mark.parametrize(
    ("layer", "shape"), CONVOLUTIONS + NORMALISATIONS, ids=lambda value: str(value)
)
def test_all_second_derivatives_are_torchs(layer, shape):
    torch.manual_seed(0)
    layer = layer.double().eval()
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
    x = torch.randn(shape, dtype=torch.float64)
    expected = second_gradients(layer, x, torch.enable_grad())
    found = second_gradients(layer, x, CheapDoubleBackward())
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_second_derivatives_are_those_of_finite_differences():
    torch.manual_seed(0)
    x, w, s = (
        torch.randn(shape, dtype=torch.float64).requires_grad_()
        for shape in ((2, 2, 3, 3), (2, 2, 2, 2), 2)
    )
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5

    def function(x, w, s):
        with CheapDoubleBackward():
            return functional.batch_norm(functional.conv2d(x, w, s, padding=1), mean, var, s, s)

    assert torch.autograd.gradgradcheck(function, (x, w, s))


def nodes(output):
    """Names of all functions in a graph."""
    pending, found = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None:
            found.add(node.name())
            pending += [parent for parent, _ in node.next_functions]
    return found


def test_plain_layers_are_replaced_and_only_while_it_is_active():
    model, x = conv_net().eval(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    torchs = {"ConvolutionBackward0", "NativeBatchNormBackward0"}
    ours = {"_ConvolutionBackward", "_NormalisationBackward"}
    with CheapDoubleBackward():
        inside = nodes(model(x))
    outside = nodes(model(x))
    assert not inside & torchs
    assert inside >= ours
    assert outside >= torchs
    assert not outside & ours


def weight_normed(how):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)]
    layers[0] = how(layers[0])
    return nn.Sequential(*layers).double()


class Raw(nn.Module):
    """Normalised by hand, where nothing tells it."""

    def __init__(self):
        super().__init__()
        self.v, self.g = (
            nn.Parameter(torch.randn(3, 4).double()),
            nn.Parameter(torch.ones(3, 1).double()),
        )

    def forward(self, x):
        return x @ torch._weight_norm(self.v, self.g, 0).T


def test_weight_normalisation_against_differences_of_gradients():
    # The oracle uses first derivatives only: torch's second derivative of this kernel is off by
    # half its size.
    model = weight_normed(nn.utils.parametrizations.weight_norm)
    x, y = torch.randn(7, 4).double(), torch.randint(3, (7,))
    operator = HessianOperator(model, nn.CrossEntropyLoss(), (x, y))
    found, step, columns = operator.dense(), 1e-5, []
    flat = torch.cat([p.detach().reshape(-1) for p in operator.parameters])
    for index in range(operator.size):
        gradients = []
        for sign in (1, -1):
            moved = flat.clone()
            moved[index] += sign * step
            nn.utils.vector_to_parameters(moved, operator.parameters)
            gradients.append(operator.gradient())
        columns.append((gradients[0] - gradients[1]) / (2 * step))
    torch.testing.assert_close(found, torch.stack(columns, dim=1), atol=1e-8, rtol=1e-6)
    assert found.abs().max() > 0.05


def test_weight_normalisation_that_cannot_be_replaced_is_refused():
    operator = HessianOperator(
        Raw(), nn.CrossEntropyLoss(), (torch.randn(7, 4).double(), torch.randint(3, (7,)))
    )
    with pytest.raises(HessianFlowError, match="_weight_norm has a wrong second derivative"):
        operator @ torch.ones(operator.size).double()


@pytest.mark.parametrize(
    ("model", "entered"), [(conv_net(), True), (mlp(), False)], ids=["conv net", "mlp"]
)
def test_an_operator_uses_the_cheap_kernels_where_there_are_some(model, entered, monkeypatch):
    made = []

    class Noted(CheapDoubleBackward):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr("hessianflow.curvature.surroundings.CheapDoubleBackward", Noted)
    problem = classification(model, (1, 8, 8) if entered else (20,), 6)
    operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    operator @ torch.ones(operator.size, dtype=operator.dtype)
    assert bool(made) is entered


class Functional(nn.Module):
    """A convolution without a layer of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 1, 3, 3))

    def forward(self, x):
        return functional.conv2d(x, self.weight)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (mlp(), False),
        (nn.LayerNorm(3), False),
        (nn.BatchNorm1d(3), True),
        (conv_net(), True),
        (Functional(), True),
    ],
    ids=["mlp", "layer norm", "batch norm", "conv net", "functional"],
)
def test_models_without_anything_to_replace_are_told(model, expected):
    assert has_replacements(model) is expected


def test_images_in_float32_go_with_the_channels_last():
    x = torch.randn(2, 3, 8, 8)
    with CheapDoubleBackward():
        outputs = nn.BatchNorm2d(4).eval()(nn.Conv2d(3, 4, 3)(x))
        double = nn.Conv2d(3, 4, 3).double()(x.double())
    assert outputs.is_contiguous(memory_format=torch.channels_last)
    assert double.is_contiguous()


def test_the_hessian_in_float32_is_that_in_float64():
    """Without kinks: a sign that flips with rounding would be no error of the product."""
    problem = classification(conv_net(), (1, 8, 8), 20)
    train(problem, 10)
    layers = [nn.Tanh() if isinstance(layer, nn.ReLU) else layer for layer in problem.model]
    double = HessianOperator(nn.Sequential(*layers), problem.loss_fn, problem.pair)
    v = torch.randn(double.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = double @ v
    single = HessianOperator(
        nn.Sequential(*layers).float(), problem.loss_fn, (problem.inputs.float(), problem.targets)
    )
    error = (single @ v.float()).double() - expected
    assert error.norm() < 1e-5 * expected.norm()


class Checkpointed(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=False)


def test_a_checkpointed_part_is_left_to_torch():
    """Its graph is built again in every product, and must come out the same."""
    problem = classification(conv_net(), (1, 8, 8), 20)
    train(problem, 10)
    model = problem.model.eval()
    plain = HessianOperator(model, problem.loss_fn, problem.pair)
    operator = HessianOperator(
        nn.Sequential(Checkpointed(model[:6]), model[6:]), problem.loss_fn, problem.pair
    )
    v = torch.randn(plain.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(operator @ v, plain @ v)


def test_a_model_that_uses_transforms_is_left_to_torch():
    weight = nn.Conv2d(1, 2, 3).double()

    class Slopes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = weight

        def forward(self, x):
            return torch.func.vmap(torch.func.grad(lambda one: self.layer(one[None]).sin().sum()))(
                x
            ).flatten(1)

    x, y = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 3, 5])
    operator = HessianOperator(Slopes(), functional.cross_entropy, (x, y))
    v = torch.ones(operator.size, dtype=torch.float64)
    parameters = list(operator.parameters)
    first = torch.autograd.grad(
        functional.cross_entropy(Slopes()(x), y), parameters, create_graph=True
    )
    slope = sum(g.sum() for g in first)
    expected = torch.autograd.grad(slope, parameters)
    torch.testing.assert_close(operator @ v, torch.cat([g.flatten() for g in expected]))


class Excited(nn.Module):
    """Squeeze and excitation, as MobileNetV3 has it: its gate is a hard sigmoid."""

    def __init__(self, gate):
        super().__init__()
        self.squeeze, self.excite, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.gate = gate

    def forward(self, x):
        hidden = self.squeeze(x)
        return self.head(hidden * self.gate(4 * self.excite(hidden)))


GATES = {
    "layer": nn.Hardsigmoid,
    "layer in place": lambda: nn.Hardsigmoid(inplace=True),
    "function": lambda: functional.hardsigmoid,
    "function in place": lambda: lambda x: functional.hardsigmoid(x, inplace=True),
    "function of torch": lambda: torch._C._nn.hardsigmoid,
    "function of torch in place": lambda: torch._C._nn.hardsigmoid_,
}


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_the_hard_sigmoid_is_replaced(gate, kind):
    """The oracle writes it out; torch's own kernel has no second derivative."""
    written = classification(
        initialised(Excited(lambda x: (x / 6 + 0.5).clamp(0, 1)).double(), 0), (4,), 20, 3
    )
    model = initialised(Excited(gate()).double(), 0)
    model.register_buffer("any", torch.ones(1))
    found = kind(model, written.loss_fn, written.pair, check_product=True).dense()
    torch.testing.assert_close(found, kind(written.model, written.loss_fn, written.pair).dense())


def test_in_place_means_in_place():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.gate = nn.Linear(4, 3), nn.Hardsigmoid(inplace=True)

        def forward(self, x):
            hidden = self.layer(x)
            hidden = hidden * 1
            self.gate(hidden)
            return hidden

    problem = classification(initialised(Shared().double(), 0), (4,), 20, 3)
    operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    expected = float(problem.loss_fn(problem.model(problem.inputs), problem.targets).detach())
    assert operator.mean_loss() == pytest.approx(expected)


def test_a_hard_sigmoid_that_nothing_shows_is_named():
    problem = classification(initialised(Excited(functional.hardsigmoid).double(), 0), (4,), 20, 3)
    operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    with pytest.raises(
        HessianFlowError,
        match=r"'hardsigmoid_backward' has none; use nn\.Hardsigmoid, which is replaced",
    ):
        operator @ torch.ones(operator.size).double()
