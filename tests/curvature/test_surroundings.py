"""A product is that of the function in evaluation mode, whatever hooks, fast paths or checkpoints
the model has.

Oracles: the same network without them, and dense autograd in float64.
"""

import pytest
import torch
from problems import Problem, classification, conv_net, dense_hessian, initialised, mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hessianflow.curvature import (
    CurvatureProbe,
    FisherOperator,
    GGNOperator,
    HessianOperator,
    loss_landscape,
    spectrum_report,
    top_eigenpairs,
)
from hessianflow.interfaces import HessianFlowError

KINDS = [HessianOperator, GGNOperator, FisherOperator]


def small(seed=0):
    return classification(mlp((5, 6, 4), seed), (5,), 20, 4)


def vector(size):
    return torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class TestHooks:
    """They belong to the training step: clipping, rates of layers, statistics."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("microbatch_size", [None, 7])
    @pytest.mark.parametrize(
        "hook", [lambda g: g * 0.5, lambda g: g.clamp(-1e-3, 1e-3), torch.zeros_like]
    )
    def test_hooks_of_parameters(self, hook, microbatch_size, kind):
        plain, hooked = small(), small()
        expected = kind(plain.model, plain.loss_fn, plain.pair)
        operator = kind(hooked.model, hooked.loss_fn, hooked.pair, microbatch_size=microbatch_size)
        for parameter in hooked.model.parameters():
            parameter.register_hook(hook)
        v = vector(expected.size)
        torch.testing.assert_close(operator @ v, expected @ v)
        torch.testing.assert_close(operator.gradient(), expected.gradient())

    def test_a_hook_registered_after_the_graph_was_built(self):
        problem = small()
        operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
        v = vector(operator.size)
        before = operator @ v
        problem.model[0].weight.register_hook(lambda g: g * 0.5)
        assert torch.equal(operator @ v, before)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "register", ["register_full_backward_hook", "register_full_backward_pre_hook"]
    )
    def test_backward_hooks_of_modules(self, register, kind):
        plain, hooked, calls = small(), small(), []

        def halve(module, *gradients):
            calls.append(module)
            return tuple(g if g is None else g * 0.5 for g in gradients[0])

        for layer in hooked.model:
            getattr(layer, register)(halve)
        expected = kind(plain.model, plain.loss_fn, plain.pair)
        v = vector(expected.size)
        torch.testing.assert_close(
            kind(hooked.model, hooked.loss_fn, hooked.pair) @ v, expected @ v
        )
        assert not calls

    def test_hooks_are_as_found(self):
        """In their order, with handles that still remove them, and they run in training."""
        problem, calls = small(), []
        weight = problem.model[0].weight
        handles = [weight.register_hook(lambda g, i=i: calls.append(i)) for i in range(3)]
        layer = problem.model[2].register_full_backward_hook(lambda *_: calls.append("layer"))
        top_eigenpairs(HessianOperator(problem.model, problem.loss_fn, problem.pair), seed=0)
        assert not calls
        handles[1].remove()
        problem.loss_fn(problem.model(problem.inputs), problem.targets).backward()
        assert calls == ["layer", 0, 2]
        layer.remove()
        assert not problem.model[2]._backward_hooks

    def test_hooks_come_back_when_the_loss_raises(self):
        problem = small()
        problem.model[0].weight.register_hook(lambda g: g)

        def loss(outputs, targets):
            raise KeyError("the user's own")

        with pytest.raises(KeyError, match="the user's own"):
            HessianOperator(problem.model, loss, problem.pair) @ vector(64)
        assert len(problem.model[0].weight._backward_hooks) == 1


class Encoder(nn.Module):
    """In torch's fast path, padded places are zeros; pooling over all places sees them."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(10, 8), nn.Linear(8, 3)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, ids):
        return self.head(self.encoder(self.table(ids), src_key_padding_mask=ids.eq(0)).mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:.*enable_nested_tensor is True")
class TestFastPath:
    def problem(self):
        source = torch.Generator().manual_seed(0)
        ids = torch.randint(1, 10, (6, 5), generator=source)
        ids[0, 3:] = 0
        ids[3, 2:] = 0
        model = initialised(Encoder(), 0).double()
        return Problem(model, F.cross_entropy, ids, torch.randint(0, 3, (6,), generator=source))

    def test_a_selection_is_the_submatrix(self):
        problem = self.problem()
        full = HessianOperator(problem.model, problem.loss_fn, problem.pair)
        head = HessianOperator(problem.model, problem.loss_fn, problem.pair, params="head")
        at = torch.cat(
            [
                torch.full((p.numel(),), n.startswith("head"))
                for n, p in problem.model.named_parameters()
            ]
        )
        columns = [i for i, chosen in enumerate(at.tolist()) if chosen][:5]
        units = torch.eye(full.size, dtype=torch.float64)[:, columns]
        torch.testing.assert_close((full @ units)[at], head @ units[at])
        assert CurvatureProbe(problem.model, problem.loss_fn, problem.pair)().converged

    def test_the_loss_is_that_of_the_same_function(self):
        problem = self.problem()
        problem.model.eval()
        with torch.enable_grad():
            expected = float(
                problem.loss_fn(problem.model(problem.inputs), problem.targets).detach()
            )
        assert torch.backends.mha.get_fastpath_enabled()
        operator = HessianOperator(problem.model, problem.loss_fn, problem.pair, params="head")
        assert operator.mean_loss() == pytest.approx(expected, rel=1e-12)
        flat = loss_landscape(operator, vector(operator.size), points=1, span=1e-9)
        assert float(flat.losses[0]) == pytest.approx(expected, rel=1e-6)
        assert torch.backends.mha.get_fastpath_enabled()


class Recomputed(nn.Module):
    def __init__(self, part, run, is_recomputed):
        super().__init__()
        self.first, self.part, self.head = nn.Linear(4, 4), part, nn.Linear(4, 3)
        self.run, self.is_recomputed = run, is_recomputed

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        if self.is_recomputed:
            hidden = checkpoint(self.run, self, hidden, use_reentrant=False)
        else:
            hidden = self.run(self, hidden)
        return self.head(hidden.mean(1))


def attention():
    def run(model, hidden):
        return F.scaled_dot_product_attention(*model.part(hidden)[:, None].chunk(3, -1))[:, 0]

    return nn.Linear(4, 12), run


def batch_norm():
    layers = nn.Sequential(nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6), nn.Tanh())
    return layers, lambda model, hidden: model.part(hidden)


def dropout():
    return nn.Sequential(
        nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh()
    ), lambda model, hidden: model.part(hidden)


class Counting(nn.Linear):
    """Writes to a buffer whenever it runs, also when it is computed again."""

    def __init__(self):
        super().__init__(4, 4)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs += 1
        return super().forward(x)


@pytest.mark.parametrize(
    "make", [attention, batch_norm, dropout, lambda: (Counting(), batch_norm()[1])]
)
@pytest.mark.parametrize(
    "options", [{}, {"params": ["first", "head"]}, {"params": "part"}], ids=str
)
@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
def test_checkpointed_parts_are_computed_again_as_they_were(make, options, kind):
    """The oracle is the model without checkpoints; flags, modes and kernels must be those of the
    first pass."""
    torch.manual_seed(0)
    plain, recomputed = (
        initialised(Recomputed(*make(), flag).double(), 0) for flag in (False, True)
    )
    recomputed.train()
    inputs, targets = torch.randn(10, 6, 4).double(), torch.randint(0, 3, (10,))
    expected = kind(plain, F.cross_entropy, (inputs, targets), **options)
    v = vector(expected.size)
    for size in (None, 6):
        operator = kind(
            recomputed, F.cross_entropy, (inputs, targets), microbatch_size=size, **options
        )
        for _ in range(3):
            torch.testing.assert_close(operator @ v, expected @ v, rtol=1e-10, atol=1e-12)
        assert size is not None or operator._kept is not None
    assert all(module.training for module in recomputed.modules())
    assert not any(float(b) for name, b in recomputed.named_buffers() if name.endswith("runs"))


def test_what_changes_when_it_runs_again_is_refused():
    model, calls = Recomputed(nn.Linear(4, 4), None, True).double(), []

    def run(model, hidden):
        calls.append(0)
        return model.part(hidden[:, : 6 if len(calls) == 1 else 3])

    model.run = run
    data = (torch.randn(10, 6, 4).double(), torch.randint(0, 3, (10,)))
    with pytest.raises(
        HessianFlowError, match="a checkpointed part of the model returns other tensors"
    ):
        HessianOperator(model, F.cross_entropy, data, check_deterministic=False) @ torch.ones(
            55
        ).double()


class Field(nn.Module):
    """u + du/dx of a network u(x): a physics-informed loss differentiates by its inputs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x):
        x = x.detach().requires_grad_()
        u = self.body(x)
        return u + torch.autograd.grad(u.sum(), x, create_graph=True)[0]


class Written(nn.Module):
    """The same, its derivative written out."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        first, _, last = self.body
        hidden = torch.tanh(first(x))
        return last(hidden) + ((1 - hidden**2) * first.weight[:, 0]) @ last.weight.T


class TestLossesThatDifferentiate:
    def problems(self):
        x = torch.linspace(0, 1, 20)[:, None].double()
        model = initialised(Field().double(), 0)
        return Problem(model, F.mse_loss, x, x.sin()), Problem(
            Written(model.body), F.mse_loss, x, x.sin()
        )

    def test_everything_that_is_measured(self):
        problem, written = self.problems()
        matrix = dense_hessian(written)
        operator = HessianOperator(problem.model, problem.loss_fn, problem.pair, check_product=True)
        torch.testing.assert_close(operator.dense(), matrix)
        expected = float(written.loss_fn(written.model(written.inputs), written.targets).detach())
        assert operator.mean_loss() == pytest.approx(expected)
        leading = float(torch.linalg.eigvalsh(matrix)[-1])
        assert CurvatureProbe(
            problem.model, problem.loss_fn, problem.pair
        )().eigenvalue == pytest.approx(leading, 1e-2)
        report = spectrum_report(problem.model, problem.loss_fn, problem.pair, k=1)
        assert report.loss == pytest.approx(expected)
        assert float(report.eigen.values[0]) == pytest.approx(leading, 1e-3)
        with torch.no_grad():
            assert operator.mean_loss() == pytest.approx(expected)
            assert len(loss_landscape(operator, vector(operator.size), points=3).losses) == 3

    def test_a_gradient_penalty_over_a_dict(self):
        problem = classification(mlp((4, 5, 1)), (4,), 10, 2)
        batch = {"real": problem.inputs, "fake": -problem.inputs}

        def loss(model, batch):
            mixed = (0.3 * batch["real"] + 0.7 * batch["fake"]).requires_grad_()
            (slope,) = torch.autograd.grad(model(mixed).sum(), mixed, create_graph=True)
            penalty = (slope.norm(dim=1) - 1).square().mean()
            return model(batch["fake"]).mean() - model(batch["real"]).mean() + penalty

        operator = HessianOperator(problem.model, loss, batch, check_product=True)
        matrix = operator.dense()
        torch.testing.assert_close(matrix, matrix.T)
        v, step = vector(operator.size), 1e-6
        before, sizes = operator.gradient(), [p.numel() for p in operator.parameters]
        with torch.no_grad():
            for parameter, piece in zip(operator.parameters, v.split(sizes), strict=True):
                parameter += step * piece.view_as(parameter)
        torch.testing.assert_close(
            (operator.gradient() - before) / step, matrix @ v, rtol=1e-4, atol=1e-5
        )

    def test_weights_that_are_constants_here(self):
        problem = small()
        weight = problem.model[0].weight

        def loss(outputs, targets):
            value = F.cross_entropy(outputs, targets)
            return value + torch.autograd.grad(value, weight, create_graph=True)[0].square().sum()

        assert HessianOperator(problem.model, loss, problem.pair).dense().isfinite().all()
        with pytest.raises(
            HessianFlowError, match="something that is a constant here, such as weights"
        ):
            HessianOperator(problem.model, loss, problem.pair, params="2") @ vector(28)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a * a

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Mixed(torch.autograd.Function):
    """As for mixed precision: torch's decorators wrap the backward."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a * a

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Hidden(Mixed):
    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


@pytest.mark.parametrize("function", [Square, Mixed])
@pytest.mark.parametrize("kind", KINDS)
def test_functions_that_can_be_differentiated_twice(function, kind):
    problem = small()
    expected = kind(problem.model, lambda o, t: F.cross_entropy(o * o, t), problem.pair)
    operator = kind(problem.model, lambda o, t: F.cross_entropy(function.apply(o), t), problem.pair)
    torch.testing.assert_close(operator.dense(), expected.dense())


@pytest.mark.parametrize("kind", KINDS)
def test_once_differentiable_is_seen_below_other_decorators(kind):
    problem = small()
    with pytest.raises(HessianFlowError, match="Hidden is once_differentiable"):
        kind(
            problem.model, lambda o, t: F.cross_entropy(Hidden.apply(o), t), problem.pair
        ) @ vector(64)


class TestBatchStatistics:
    def net(self):
        return initialised(
            nn.Sequential(
                nn.Linear(4, 6),
                nn.BatchNorm1d(6, track_running_stats=False),
                nn.Tanh(),
                nn.Linear(6, 3),
            ),
            0,
        ).double()

    @pytest.mark.parametrize("kind", [HessianOperator, GGNOperator, FisherOperator, CurvatureProbe])
    @pytest.mark.parametrize("microbatch_size", [1, 8, 100])
    def test_layers_without_running_statistics(self, microbatch_size, kind):
        problem = classification(self.net(), (4,), 40, 3)
        with pytest.raises(
            HessianFlowError, match="without running statistics needs each batch in one"
        ):
            kind(problem.model, problem.loss_fn, problem.pair, microbatch_size=microbatch_size)
        kind(problem.model, problem.loss_fn, problem.pair)

    def test_other_normalisation_is_cut_as_it_likes(self):
        """Instance and layer normalisation see one example at a time, tracked or not."""
        model = nn.Sequential(
            nn.Conv1d(2, 4, 1),
            nn.InstanceNorm1d(4, affine=True),
            nn.GroupNorm(2, 4),
            nn.Flatten(),
            nn.Linear(20, 3),
        )
        problem = classification(initialised(model.double(), 0), (2, 5), 12, 3)
        whole, cut = (
            HessianOperator(problem.model, problem.loss_fn, problem.pair, microbatch_size=s)
            for s in (None, 5)
        )
        v = vector(whole.size)
        torch.testing.assert_close(cut @ v, whole @ v)

    def test_one_example_has_no_statistics(self):
        problem = classification(self.net(), (4,), 1, 3)
        with pytest.raises(
            HessianFlowError, match="statistics of the batch, and one example has none"
        ):
            HessianOperator(problem.model, problem.loss_fn, problem.pair) @ vector(63)
        tracked = classification(conv_net(), (1, 1, 1), 1, 10)
        with pytest.raises(HessianFlowError, match="one example has none"):
            HessianOperator(
                tracked.model, tracked.loss_fn, tracked.pair, norm_mode="batch"
            ) @ vector(348)
