"""Whatever makes products wrong without a word is seen by a difference of gradients, and nothing
else is.

experiments/benchmarks/differences.py counts false alarms over hundreds of networks; here are a
dozen.
"""

import pytest
import torch
from problems import classification, conv_net, initialised, mlp, train
from torch import nn
from torch.nn import functional as F

from hessianflow.curvature import (
    CurvatureProbe,
    FisherOperator,
    GGNOperator,
    HessianOperator,
    spectral_density,
    spectrum_report,
    top_eigenpairs,
)
from hessianflow.distributed import LocalReducer
from hessianflow.distributed.curvature import sharded
from hessianflow.interfaces import HessianFlowError

KINDS = [HessianOperator, GGNOperator, FisherOperator]


class KeptOnContext(torch.autograd.Function):
    """Keeps an intermediate where torch cannot see that it depends on the input."""

    @staticmethod
    def forward(ctx, a):
        ctx.value = a.sigmoid()
        return ctx.value.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.value * (1 - ctx.value)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        return a.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


def hooked(a, hook):
    if a.requires_grad:
        a.register_hook(hook)
    return a


FAULTS = {
    "intermediate on ctx": KeptOnContext.apply,
    "reversed": Reversed.apply,
    "hook on an activation": lambda a: hooked(a * 1, lambda g: g * 0.5),
    "clamped": lambda a: hooked(a * 1, lambda g: g.clamp(-1e-3, 1e-3)),
    "detached": lambda a: a * a.detach().sigmoid(),
    "through .data": lambda a: a * torch.sigmoid(a.data),
    "through NumPy": lambda a: a * torch.from_numpy(a.detach().numpy() ** 2),
}
UNSEEN_IN_THE_GRAPH = {
    name: fault for name, fault in FAULTS.items() if not hasattr(fault, "__self__")
}


class Faulty(nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.first, self.last, self.fault = nn.Linear(4, 6), nn.Linear(6, 3), fault

    def forward(self, x):
        return self.last(torch.relu(self.fault(self.first(x))))


def faulty(fault, dtype=torch.float64):
    return classification(initialised(Faulty(fault).to(dtype), 0), (4,), 20, 3)


class TestFaults:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("microbatch_size", [None, 7])
    @pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
    def test_of_the_hessian(self, fault, microbatch_size, dtype):
        if dtype == torch.bfloat16 and fault is FAULTS["through NumPy"]:
            pytest.skip("NumPy has no bfloat16")
        problem = faulty(fault, dtype)
        operator = HessianOperator(
            problem.model,
            problem.loss_fn,
            problem.pair,
            microbatch_size=microbatch_size,
            check_product=True,
        )
        with pytest.raises(
            HessianFlowError,
            match=r"a product is .*% off from a difference of gradients.*check_product=F",
        ):
            operator @ torch.ones(operator.size, dtype=operator.dtype)

    @pytest.mark.parametrize("kind", [GGNOperator, FisherOperator])
    @pytest.mark.parametrize("fault", [name for name in FAULTS if name != "intermediate on ctx"])
    def test_of_matrices_of_first_derivatives(self, fault, kind):
        problem = faulty(FAULTS[fault])
        with pytest.raises(HessianFlowError, match="off from a difference of gradients"):
            top_eigenpairs(
                kind(problem.model, problem.loss_fn, problem.pair, check_product=True), seed=0
            )

    @pytest.mark.parametrize("kind", [GGNOperator, FisherOperator])
    def test_what_is_right_in_first_derivatives(self, kind):
        """The intermediate is missed by the second derivative only."""
        problem, twin = faulty(KeptOnContext.apply), faulty(torch.sigmoid)
        found = kind(problem.model, problem.loss_fn, problem.pair, check_product=True).dense()
        torch.testing.assert_close(found, kind(twin.model, twin.loss_fn, twin.pair).dense())

    def test_of_the_loss_in_the_gauss_newton_matrix(self):
        problem = classification(mlp((4, 6, 3)), (4,), 20, 3)
        operator = GGNOperator(
            problem.model, lambda o, t: F.cross_entropy(KeptOnContext.apply(o), t), problem.pair
        )
        with pytest.raises(HessianFlowError, match=r"look at KeptOnContext"):
            operator @ torch.ones(operator.size).double()

    def test_the_place_and_the_function_are_named(self):
        problem = classification(mlp((4, 6, 6, 3)), (4,), 20, 3)
        problem.model[2].bias.data += 1

        class Shifted(KeptOnContext):
            pass

        problem.model[1].register_forward_hook(
            lambda module, inputs, outputs: Shifted.apply(outputs)
        )
        with pytest.raises(
            HessianFlowError, match=r"off from .* at [02]\.(weight|bias): .*look at Shifted"
        ):
            top_eigenpairs(HessianOperator(problem.model, problem.loss_fn, problem.pair), seed=0)

    def test_a_small_fault_in_one_layer_is_seen(self):
        """It moves the whole product by less than a tenth of a percent."""
        problem = classification(mlp((4, 6, 3)), (4,), 20, 3)
        problem.model.register_parameter("scale", nn.Parameter(torch.ones(3).double() * 1e-2))
        model = problem.model

        class Scaled(nn.Module):
            def __init__(self, is_right):
                super().__init__()
                self.model, self.is_right = model, is_right

            def forward(self, x):
                outputs = nn.Sequential.forward(self.model, x)
                detached = outputs if self.is_right else outputs.detach()
                return outputs + 1e-3 * detached * self.model.scale

        right, wrong = (
            HessianOperator(Scaled(r), problem.loss_fn, problem.pair, check_product=False)
            for r in (1, 0)
        )
        v = torch.randn(right.size, generator=torch.Generator().manual_seed(0)).double()
        assert (wrong @ v - right @ v).norm() < 1e-3 * (right @ v).norm()
        HessianOperator(Scaled(True), problem.loss_fn, problem.pair, check_product=True) @ v
        with pytest.raises(HessianFlowError, match=r"model\.scale"):
            HessianOperator(Scaled(False), problem.loss_fn, problem.pair, check_product=True) @ v


class TestWhen:
    def operator(self, fault=FAULTS["detached"], **options):
        problem = faulty(fault)
        return HessianOperator(problem.model, problem.loss_fn, problem.pair, **options)

    def test_with_the_first_product_where_the_graph_gives_reason(self):
        for name in ("intermediate on ctx", "reversed"):
            with pytest.raises(HessianFlowError, match="look at"):
                top_eigenpairs(self.operator(FAULTS[name]), seed=0)

    def test_with_product_100_where_it_costs_a_percent(self):
        operator = self.operator()
        v = torch.ones(operator.size).double()
        for _ in range(99):
            operator @ v
        with pytest.raises(HessianFlowError, match="off from a difference"):
            operator @ v
        with pytest.raises(HessianFlowError, match="off from a difference"):
            spectral_density(self.operator(), num_probes=4, steps=30, seed=0)

    def test_once(self):
        """It runs the model a few times more, in one product."""
        problem, calls = classification(mlp((4, 5, 3)), (4,), 12, 3), []
        problem.model.register_forward_hook(lambda *_: calls.append(0))
        operator = HessianOperator(problem.model, problem.loss_fn, problem.pair, check_product=True)
        v = torch.ones(operator.size).double()
        operator @ v
        first = len(calls)
        assert (
            first == 4
            # to see whether the loss repeats, the graph, and the check: at the weights and a step
            # further
        )
        for _ in range(120):
            operator @ v
        assert len(calls) == first

    def test_never_if_it_is_not_wanted(self):
        operator = self.operator(FAULTS["intermediate on ctx"], check_product=False)
        v = torch.ones(operator.size).double()
        for _ in range(120):
            operator @ v

    def test_in_the_first_call_of_a_probe(self):
        problem = faulty(FAULTS["detached"])
        with pytest.raises(HessianFlowError, match="off from a difference"):
            CurvatureProbe(problem.model, problem.loss_fn, problem.pair)()
        probe = CurvatureProbe(problem.model, problem.loss_fn, problem.pair, check_product=False)
        probe()
        problem.model.fault = KeptOnContext.apply
        with pytest.raises(HessianFlowError, match="look at KeptOnContext"):
            CurvatureProbe(problem.model, problem.loss_fn, problem.pair)()

    def test_later_calls_cost_nothing(self):
        problem, calls = classification(mlp((4, 5, 3)), (4,), 12, 3), []
        problem.model.register_forward_hook(lambda *_: calls.append(0))
        probe = CurvatureProbe(problem.model, problem.loss_fn, problem.pair)
        counts = []
        for _ in range(3):
            probe()
            counts.append(len(calls))
        assert counts == [4, 5, 6]

    def test_over_all_ranks(self):
        problem = faulty(FAULTS["detached"])
        probe = CurvatureProbe(
            problem.model,
            problem.loss_fn,
            problem.pair,
            operator=sharded(LocalReducer(), HessianOperator),
        )
        with pytest.raises(HessianFlowError, match="off from a difference"):
            probe()

    def test_in_a_report(self):
        problem = faulty(FAULTS["detached"])
        with pytest.raises(HessianFlowError, match="off from a difference"):
            spectrum_report(problem.model, problem.loss_fn, problem.pair, k=1)
        assert (
            spectrum_report(
                problem.model, problem.loss_fn, problem.pair, k=1, check_product=False
            ).size
            == 51
        )


class Rounding(nn.Module):
    """Rounds its outputs to another type."""

    def __init__(self, body, dtype):
        super().__init__()
        self.body, self.dtype = body, dtype

    def forward(self, x):
        return self.body(x).to(self.dtype).to(x.dtype)


class SinglePrecision(nn.Module):
    """Holds a constant that is neither weight nor buffer, and so keeps its type."""

    def __init__(self, body):
        super().__init__()
        self.body, self.mixing = body, torch.eye(3) + 0.1 * torch.ones(3, 3)

    def forward(self, x):
        return self.body(x) @ self.mixing


class Dropping(nn.Module):
    def forward(self, x):
        # a straight-through estimator
        return x + torch.round(2000 * x.detach()) / 2000 - x.detach()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight, self.head = self.first.weight, nn.Linear(4, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


def trained(model, shape, classes=10, steps=20, **options):
    problem = classification(model, shape, 16, classes)
    train(problem, steps, batch_size=8)
    return problem, options


class Padded(nn.Module):
    """Reads the row for padding like any other, as a sum over positions does."""

    def __init__(self, embed, tied=False):
        super().__init__()
        self.embed, self.tied = embed, tied
        self.head = nn.Linear(4, 3)
        nn.init.normal_(embed.weight)

    def forward(self, tokens):
        hidden = self.embed(tokens).tanh().sum(1)
        return hidden @ self.embed.weight[:3].T if self.tied else self.head(hidden)


def on_kinks():
    """Black borders, no biases: as many units are at 0 exactly, where relu has no derivative."""
    model = nn.Sequential(
        *(
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 10),
        )
    )
    problem, options = trained(model, (1, 8, 8), steps=0)
    problem.inputs[:, :, :4] = 0
    return problem, options


HEALTHY = {
    "on kinks": on_kinks,
    "rectified, float32": lambda: trained(
        initialised(nn.Sequential(*mlp((4, 9)), nn.ReLU(), nn.Linear(9, 3)).float(), 0), (4,), 3
    ),
    "16 bits": lambda: trained(mlp((4, 6, 3), dtype=torch.bfloat16), (4,), 3),
    "convolutions": lambda: trained(conv_net(dtype=torch.float32), (1, 8, 8)),
    "statistics of the batch": lambda: trained(
        conv_net(dtype=torch.float32), (1, 8, 8), norm_mode="batch"
    ),
    "rounds to float32": lambda: trained(Rounding(mlp((4, 6, 3)), torch.float32), (4,), 3),
    "rounds to 16 bits": lambda: trained(Rounding(mlp((4, 6, 3)), torch.bfloat16), (4,), 3),
    "straight-through": lambda: trained(
        nn.Sequential(mlp((4, 6)), Dropping(), nn.Linear(6, 3).double()), (4,), 3
    ),
    "float32 only": lambda: trained(SinglePrecision(mlp((4, 6, 3), dtype=torch.float32)), (4,), 3),
    "tied and partly frozen": lambda: trained(initialised(Tied(), 0), (4,), 3),
    "recurrent": lambda: trained(initialised(Recurrent(), 0), (5, 3), 3),
    "spectral norm": lambda: trained(nn.utils.spectral_norm(nn.Linear(4, 3)), (4,), 3),
    "weight norm": lambda: trained(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (4,), 3),
    "fitted": lambda: trained(mlp((4, 20, 3), dtype=torch.float32), (4,), 3, steps=400),
    "zero weights": lambda: trained(
        nn.Sequential(mlp((4, 6)), nn.Linear(6, 3).double()).apply(zeroed), (4,), 3, steps=0
    ),
}


def zeroed(layer):
    if isinstance(layer, nn.Linear):
        nn.init.zeros_(layer.weight)


def snapshot(model, loss):
    tensors = [*model.parameters(), *model.buffers(), *loss.parameters(), *loss.buffers()]
    return [
        (t, t.data_ptr(), t._version, t.requires_grad, t.dtype, t.detach().clone()) for t in tensors
    ]


@pytest.mark.filterwarnings("ignore:.*is deprecated in favor of.*:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", HEALTHY.values(), ids=HEALTHY)
def test_healthy_models_pass_and_are_as_found(make, kind):
    problem, options = make()
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    loss.register_buffer(
        "weight",
        torch.ones(len(problem.targets.unique()) and 10 if problem.inputs.ndim == 4 else 3),
    )
    loss.weight = loss.weight.to(problem.inputs.dtype)
    for parameter in problem.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    held = {name: vars(module).copy() for name, module in problem.model.named_modules()}
    before, state = snapshot(problem.model, loss), torch.get_rng_state()
    operator = kind(problem.model, loss, problem.pair, check_product=True, **options)
    v = torch.randn(operator.size, generator=torch.Generator().manual_seed(0)).to(operator.dtype)
    first = operator @ v
    kept = operator._kept
    assert torch.equal(operator @ v, first)
    assert operator._kept is kept
    assert torch.equal(torch.get_rng_state(), state)
    after = snapshot(problem.model, loss)
    for (t, *facts, value), (u, *now, value_now) in zip(before, after, strict=True):
        assert t is u
        assert facts == now
        assert torch.equal(value, value_now)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in problem.model.parameters())
    for name, module in problem.model.named_modules():
        tensors = {
            key: value for key, value in held[name].items() if isinstance(value, torch.Tensor)
        }
        # Those that a forward pass sets anew, as the older spectral normalisation does, are of the
        # type of the model.
        assert all(vars(module)[key].dtype == value.dtype for key, value in tensors.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("embedding", "tied"),
    [
        ({"padding_idx": 0}, False),
        ({"padding_idx": -7, "sparse": True}, False),
        ({"padding_idx": 1}, True),
    ],
)
def test_rows_for_padding_are_constants(kind, embedding, tied):
    """The loss depends on them, but torch gives them no gradient: no fault, and frequent in models
    of language."""
    torch.manual_seed(0)
    model = Padded(nn.Embedding(9, 4, **embedding), tied)
    pair = torch.randint(0, 3, (16, 5)), torch.randint(0, 3, (16,))
    operator = kind(model, F.cross_entropy, pair, check_product=True)
    v = torch.randn(operator.size)
    product = operator @ v
    if not tied:
        assert not product[:36].view(9, 4)[embedding["padding_idx"]].any()
        # A fault elsewhere is seen all the same.
        model.head = nn.Sequential(model.head, Detaching())
        with pytest.raises(HessianFlowError, match="off from a difference"):
            kind(model, F.cross_entropy, pair, check_product=True) @ v


class Detaching(nn.Module):
    def forward(self, a):
        return a * a.detach()


def test_a_batch_that_cannot_be_cut_is_taken_whole():
    problem = classification(mlp((4, 5, 3)), (4,), 12, 3)
    problem.loss_fn = lambda o, t: F.cross_entropy(o, t) + o[11].square().sum()
    HessianOperator(problem.model, problem.loss_fn, problem.pair, check_product=True).dense()
    wrong = classification(Faulty(FAULTS["detached"]).double(), (4,), 12, 3)
    with pytest.raises(HessianFlowError, match="off from a difference"):
        HessianOperator(wrong.model, problem.loss_fn, wrong.pair, check_product=True).dense()
