"""The Hessian operator against dense autograd in float64, on everything that trips other
libraries."""

import functools

import pytest
import torch
from problems import Problem, classification, conv_net, dense_hessian, initialised, mlp, train
from torch import nn
from torch.nn import functional

from hessianflow.curvature import HessianOperator, top_eigenpairs

CLASSES = 4


def small(seed=0, dtype=torch.float64):
    return classification(mlp((5, 6, CLASSES), seed, dtype), (5,), 30, CLASSES)


def vector(size, seed=0, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def check(problem, operator, **tolerance):
    torch.testing.assert_close(operator.dense(), dense_hessian(problem), **tolerance)


def test_matches_dense_autograd_entry_by_entry():
    problem = small()
    operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    check(problem, operator)
    assert operator.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert (operator.size, operator.dtype, operator.num_examples) == (64, torch.float64, 30)


def test_batch_normalisation_by_running_statistics():
    problem = classification(conv_net(), (1, 8, 8), 20)
    train(problem, 10)
    check(problem, HessianOperator(problem.model, problem.loss_fn, problem.pair))


def test_batch_normalisation_by_batch_statistics():
    """The oracle is the same net with statistics computed by hand."""
    problem = classification(conv_net(), (1, 8, 8), 20)
    train(problem, 10)
    expected = HessianOperator(
        without_running_statistics(problem.model), problem.loss_fn, problem.pair
    )
    operator = HessianOperator(problem.model, problem.loss_fn, problem.pair, norm_mode="batch")
    v = vector(operator.size)
    torch.testing.assert_close(operator @ v, expected @ v)
    by_running = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    assert not torch.allclose(operator @ v, by_running @ v)


class ByHand(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        shape = (1, -1, 1, 1)
        return (x - mean) / (var + self.eps).sqrt() * self.weight.view(shape) + self.bias.view(
            shape
        )


def without_running_statistics(model):
    return nn.Sequential(*(ByHand(m) if isinstance(m, nn.BatchNorm2d) else m for m in model))


@pytest.mark.parametrize("sizes", [(30,), (13, 17), (28, 2), (10, 10, 10), (1, 29)])
@pytest.mark.parametrize("microbatch_size", [None, 7])
def test_unequal_batches_and_microbatches_count_by_examples(sizes, microbatch_size):
    """A mean of batch means is 2 to 33 % off here; the matrix must not depend on the split at
    all."""
    problem = small()
    pairs = list(zip(problem.inputs.split(sizes), problem.targets.split(sizes), strict=True))
    operator = HessianOperator(
        problem.model, problem.loss_fn, pairs, microbatch_size=microbatch_size
    )
    whole = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    v = vector(64)
    torch.testing.assert_close(operator @ v, whole @ v, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(operator.gradient(), whole.gradient())
    assert operator.mean_loss() == pytest.approx(whole.mean_loss())
    assert operator.num_examples == 30


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(reduction="none"),
        functools.partial(functional.cross_entropy, reduction="sum"),
        functional.cross_entropy,
    ],
)
def test_sums_and_per_example_losses_count_as_means(loss_fn):
    problem = small()
    pairs = list(zip(problem.inputs.split(12), problem.targets.split(12), strict=True))
    v = vector(64)
    whole = HessianOperator(problem.model, nn.CrossEntropyLoss(), problem.pair)
    torch.testing.assert_close(HessianOperator(problem.model, loss_fn, pairs) @ v, whole @ v)


def test_a_data_loader_is_data():
    problem = small()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*problem.pair),
        batch_size=8,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
    )
    v = vector(64)
    whole = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    torch.testing.assert_close(
        HessianOperator(problem.model, problem.loss_fn, loader) @ v, whole @ v
    )


@pytest.mark.parametrize("pattern", ["2", "2.*", "2.weight", ["0.bias", "2"], "*.bias"])
def test_a_selection_is_the_submatrix(pattern):
    problem = small()
    full = dense_hessian(problem)
    operator = HessianOperator(problem.model, problem.loss_fn, problem.pair, params=pattern)
    spans = {
        "0.weight": range(0, 30),
        "0.bias": range(30, 36),
        "2.weight": range(36, 60),
        "2.bias": range(60, 64),
    }
    rows = [i for name in operator.names for i in spans[name]]
    torch.testing.assert_close(operator.dense(), full[rows][:, rows])
    assert all(p.requires_grad for p in problem.model.parameters())
    chosen = [p for name, p in problem.model.named_parameters() if name in operator.names]
    by_tensor = HessianOperator(problem.model, problem.loss_fn, problem.pair, params=chosen)
    assert by_tensor.names == operator.names


def test_frozen_parameters_are_constants():
    problem = small()
    problem.model[0].weight.requires_grad_(False)
    operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    check(problem, operator)
    assert operator.size == 34
    assert not problem.model[0].weight.requires_grad


def test_unused_parameters_have_zero_rows():
    problem = small()
    problem.model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    matrix = operator.dense()
    at = list(operator.names).index("unused")
    start = sum(p.numel() for p in operator.parameters[:at])
    assert matrix[start : start + 3].abs().max() == matrix[:, start : start + 3].abs().max() == 0
    rest = [i for i in range(67) if not start <= i < start + 3]
    torch.testing.assert_close(matrix[rest][:, rest], dense_hessian(small()))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False)
        self.down.weight = nn.Parameter(torch.empty(4, 3))
        self.again = nn.Linear(4, 3, bias=False)
        self.again.weight = self.up.weight

    def forward(self, x):
        return self.again(torch.tanh(self.down(torch.tanh(self.up(x)))))


def test_tied_weights_count_once():
    problem = classification(initialised(Tied().double(), 0), (4,), 12, 3)
    operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    assert operator.size == 24
    check(problem, operator)
    assert HessianOperator(problem.model, problem.loss_fn, problem.pair, params="again").names == (
        "again.weight",
    )


class Branching(nn.Module):
    """Control flow that depends on the data, a buffer, and inputs in a dict."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, inputs):
        x = inputs["x"]
        steps = 2 if x.sum() > 0 else 3
        for _ in range(steps):
            x = torch.cat([torch.tanh(self.a(x)), x[:, :1]], dim=1)
        return self.b(x) * self.scale


def test_dict_inputs_and_control_flow():
    model = initialised(Branching().double(), 0)
    plain = classification(model, (4,), 12, 3)
    problem = Problem(model, plain.loss_fn, {"x": plain.inputs}, plain.targets)
    check(problem, HessianOperator(model, problem.loss_fn, problem.pair))
    split = HessianOperator(model, problem.loss_fn, problem.pair, microbatch_size=12)
    check(problem, split)


def test_a_dict_batch_goes_whole_to_the_loss():
    """A Hugging Face style batch: loss(model, batch)."""
    problem = small()

    def loss(model, batch):
        return functional.cross_entropy(model(batch["input"]), batch["labels"])

    batches = [
        {"input": x, "labels": y}
        for x, y in zip(problem.inputs.split(11), problem.targets.split(11), strict=True)
    ]
    v = vector(64)
    expected = HessianOperator(problem.model, problem.loss_fn, problem.pair) @ v
    torch.testing.assert_close(HessianOperator(problem.model, loss, batches) @ v, expected)
    whole = {"input": problem.inputs, "labels": problem.targets}
    for size in (None, 7):
        torch.testing.assert_close(
            HessianOperator(problem.model, loss, whole, microbatch_size=size) @ v, expected
        )


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(dim=1))


@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_transformers_whose_attention_kernel_has_no_second_derivative(microbatch_size):
    """By finite differences of the gradient in float64: error of order h^2 plus eps/h, about 1e-8
    for h = 1e-5."""
    problem = classification(initialised(Attention().double(), 0), (5, 8), 6, 3)
    operator = HessianOperator(
        problem.model, problem.loss_fn, problem.pair, microbatch_size=microbatch_size
    )
    v = vector(operator.size)
    torch.testing.assert_close(
        operator @ v, by_differences(problem, operator, v), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_nets(kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.body(x)[0][:, -1])

    problem = classification(initialised(Recurrent().double(), 0), (5, 3), 6, 3)
    operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    v = vector(operator.size)
    torch.testing.assert_close(
        operator @ v, by_differences(problem, operator, v), rtol=1e-5, atol=1e-6
    )


def by_differences(problem, operator, v, step=1e-5):
    weights = [p.detach().clone() for p in operator.parameters]
    gradients = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, w, d in zip(
                operator.parameters, weights, v.split([p.numel() for p in weights]), strict=True
            ):
                p.copy_(w + sign * step * d.view_as(w))
        problem.model.eval()
        loss = problem.loss_fn(problem.model(problem.inputs), problem.targets)
        gradients.append(
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(operator.parameters))])
        )
    with torch.no_grad():
        for p, w in zip(operator.parameters, weights, strict=True):
            p.copy_(w)
    return (gradients[0] - gradients[1]) / (2 * step)


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning"
)  # torch's own, on its first compile
def test_wrapped_and_compiled_models():
    problem = small()
    v = vector(64)
    expected = HessianOperator(problem.model, problem.loss_fn, problem.pair) @ v
    inner = nn.Sequential(torch.compile(problem.model, backend="aot_eager"))
    for model in (nn.DataParallel(problem.model), torch.compile(problem.model), inner):
        torch.testing.assert_close(
            HessianOperator(model, problem.loss_fn, problem.pair) @ v, expected
        )


def test_an_autocast_block_around_does_not_round_products():
    problem = small(dtype=torch.float32)
    operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    rebuilt = HessianOperator(problem.model, problem.loss_fn, problem.pair, microbatch_size=8)
    v = vector(64, dtype=torch.float32)
    expected = operator @ v
    with torch.autocast("cpu", torch.bfloat16):
        for candidate in (
            operator,
            rebuilt,
            HessianOperator(problem.model, problem.loss_fn, problem.pair),
        ):
            product = candidate @ v
            assert product.dtype == torch.float32
            torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-6)


def test_sixteen_bit_models_get_float32_vectors():
    problem = small(dtype=torch.float32)
    expected = HessianOperator(problem.model, problem.loss_fn, problem.pair).dense()
    half = Problem(
        problem.model.bfloat16(), problem.loss_fn, problem.inputs.bfloat16(), problem.targets
    )
    operator = HessianOperator(half.model, half.loss_fn, half.pair)
    assert operator.dtype == torch.float32
    assert (operator.dense() - expected).norm() < 0.05 * expected.norm()  # 8 bits of mantissa


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("microbatch_size", [None, 8])
def test_works_where_gradients_are_off(context, microbatch_size):
    problem = small()
    v = vector(64)
    expected = HessianOperator(problem.model, problem.loss_fn, problem.pair) @ v
    with context():
        made_here = (problem.inputs.clone(), problem.targets.clone())
        operator = HessianOperator(
            problem.model, problem.loss_fn, made_here, microbatch_size=microbatch_size
        )
        torch.testing.assert_close(operator @ v.clone(), expected)
        assert top_eigenpairs(operator, seed=0).converged


def test_a_loss_without_curvature_is_a_zero_matrix():
    """Linear in the weights; others raise here."""
    model = initialised(nn.Linear(3, 1).double(), 0)
    pair = (vector(12).view(4, 3), torch.zeros(4))
    operator = HessianOperator(model, lambda outputs, targets: outputs.mean(), pair)
    assert (operator @ vector(4)).abs().max() == 0
    result = top_eigenpairs(operator, seed=0)
    assert (result.values.item(), result.converged) == (0.0, True)


class TestCurrentWeights:
    """A kept graph must never answer for weights that are gone."""

    def changed(self, change):
        problem = small()
        operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
        v = vector(64)
        operator @ v
        change(problem)
        fresh = HessianOperator(problem.model, problem.loss_fn, problem.pair) @ v
        torch.testing.assert_close(operator @ v, fresh, rtol=0, atol=0)

    def test_after_an_optimizer_step(self):
        self.changed(lambda problem: train(problem, 1))

    def test_after_loading_a_state(self):
        self.changed(
            lambda problem: problem.model.load_state_dict(small(seed=9).model.state_dict())
        )

    def test_after_a_write_behind_autograds_back(self):
        self.changed(lambda problem: problem.model[0].weight.data.mul_(1.5))

    def test_after_the_data_pointer_moved(self):
        def move(problem):
            problem.model[0].weight.data = problem.model[0].weight.data * 2

        self.changed(move)

    def test_after_the_batch_changed(self):
        self.changed(lambda problem: problem.inputs.add_(1))

    def test_after_a_buffer_changed(self):
        problem = classification(conv_net(), (1, 8, 8), 6)
        operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
        v = vector(operator.size)
        before = operator @ v
        problem.model.train()(problem.inputs)
        after = operator @ v
        assert not torch.equal(before, after)
        assert torch.equal(after, HessianOperator(problem.model, problem.loss_fn, problem.pair) @ v)

    def test_release_changes_nothing_but_memory(self):
        problem = small()
        operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
        v = vector(64)
        before = operator @ v
        operator.release()
        assert operator._kept is None
        assert torch.equal(operator @ v, before)


@pytest.mark.parametrize("norm_mode", ["eval", "batch"])
@pytest.mark.parametrize("whole", [True, False])
def test_no_trace_is_left(norm_mode, whole):
    problem = classification(conv_net(), (1, 8, 8), 12)
    train(problem, 3)
    model = problem.model
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[1].eval()
    data = problem.pair if whole else [problem.pair, problem.pair]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes, rng = [m.training for m in model.modules()], torch.get_rng_state()
    operator = HessianOperator(model, problem.loss_fn, data, norm_mode=norm_mode)
    top_eigenpairs(operator, seed=0)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert all(p.requires_grad for p in model.parameters())


def test_a_pending_optimizer_step_still_does_its_work():
    problem = small()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    problem.loss_fn(problem.model(problem.inputs), problem.targets).backward()
    expected = [p.detach() - 0.1 * p.grad for p in problem.model.parameters()]
    top_eigenpairs(HessianOperator(problem.model, problem.loss_fn, problem.pair), seed=0)
    optimizer.step()
    for parameter, value in zip(problem.model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_construction_runs_nothing_and_keeps_nothing():
    """PyHessian's constructor alone leaks a graph: 1.1 GB in 50 calls."""
    problem = small()
    calls = 0

    def loss(outputs, targets):
        nonlocal calls
        calls += 1
        return functional.cross_entropy(outputs, targets)

    operator = HessianOperator(problem.model, loss, problem.pair)
    assert calls == 0
    assert operator._kept is None


def test_products_times_weights_are_what_ranks_add_up():
    problem = small()
    v = vector(64)
    parts = [
        HessianOperator(problem.model, problem.loss_fn, (problem.inputs[s], problem.targets[s]))
        for s in (slice(0, 11), slice(11, 30))
    ]
    counts = tuple(part.loss_weight for part in parts)
    sums = [(part @ v) * count for part, count in zip(parts, counts, strict=True)]
    expected = HessianOperator(problem.model, problem.loss_fn, problem.pair) @ v
    assert counts == (11, 19)
    torch.testing.assert_close(sum(sums) / sum(counts), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_agrees_with_the_cpu():
    problem = classification(conv_net(dtype=torch.float32), (1, 8, 8), 12)
    expected = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    v = vector(expected.size, dtype=torch.float32)
    reference = expected @ v
    operator = HessianOperator(problem.model.cuda(), problem.loss_fn, problem.pair)
    torch.testing.assert_close((operator @ v.cuda()).cpu(), reference, rtol=1e-3, atol=1e-5)


def test_an_operator_says_in_one_line_what_it_is():
    model = nn.Linear(3, 2)
    operator = HessianOperator(
        model, nn.CrossEntropyLoss(), (torch.ones(4, 3), torch.zeros(4).long())
    )
    expected = "HessianOperator(Linear: 8 weights, norm_mode='eval', torch.float32 on cpu)"
    assert repr(operator) == expected
