"""A kept graph answers for the values at hand, whoever wrote them, and is not built anew where
nothing has changed.

The oracle is an operator made after the change.
"""

import functools

import pytest
import torch
from problems import classification, initialised, mlp
from torch import nn
from torch.nn import functional as F

from hessianflow.curvature import CurvatureProbe, FisherOperator, GGNOperator, HessianOperator
from hessianflow.curvature.staleness import Snapshot
from hessianflow.interfaces import HessianFlowError


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp((4, 6, 3))
        self.square = nn.Linear(3, 3).double()
        self.register_buffer("scale", torch.ones(3, dtype=torch.float64))
        self.factor = 1.0
        self.plain = torch.ones(3, dtype=torch.float64)  # no buffer

    def forward(self, x):
        return self.square(self.body(x)) * self.scale * self.plain * self.factor


def flip(tensor):
    tensor.data.copy_(tensor.data.flip(-1))


CHANGES = {
    "batch through NumPy": lambda model, x, y, loss: x.numpy().__setitem__(
        slice(None), 2 * x.numpy() + 1
    ),
    "one number of the batch": lambda model, x, y, loss: x.numpy().__setitem__((3, 2), 9.0),
    "targets through NumPy": lambda model, x, y, loss: y.numpy().__setitem__(slice(0, 5), 2),
    "buffer through .data": lambda model, x, y, loss: model.scale.data.mul_(3),
    "sign": lambda model, x, y, loss: model.body[0].weight.data.neg_(),
    "permutation": lambda model, x, y, loss: flip(model.body[0].weight),
    "transposition": lambda model, x, y, loss: setattr(
        model.square.weight, "data", model.square.weight.data.T
    ),
    "swap": lambda model, x, y, loss: model.body[0].weight.data.copy_(
        model.body[0].weight.data[[1, 0, 2, 3, 4, 5]]
    ),
    "class weights": lambda model, x, y, loss: loss.weight.data.__setitem__(1, 5.0),
    "number of a module": lambda model, x, y, loss: setattr(model, "factor", 3),
    "tensor of a module": lambda model, x, y, loss: setattr(model, "plain", model.plain * 3),
    "layer replaced": lambda model, x, y, loss: model.body.__setitem__(1, nn.ReLU()),
    "layer added": lambda model, x, y, loss: model.body.append(nn.Tanh()),
    "forward hook": lambda model, x, y, loss: model.body[0].register_forward_hook(
        lambda m, i, o: o * 2
    ),
    "forward pre-hook": lambda model, x, y, loss: model.body.register_forward_pre_hook(
        lambda m, i: (i[0] * 2,)
    ),
    "option of the loss": lambda model, x, y, loss: setattr(loss, "label_smoothing", 0.3),
}


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator, FisherOperator])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_seen(change, kind):
    torch.manual_seed(0)
    model, loss = (
        initialised(Scaled(), 0),
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]).double()),
    )
    x, y = torch.randn(20, 4).double(), torch.randint(0, 3, (20,))
    operator = kind(model, loss, (x, y))
    v = torch.randn(operator.size).double()
    before = operator @ v
    change(model, x, y, loss)
    expected = kind(model, loss, (x, y)) @ v
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(operator @ v, expected, rtol=0, atol=0)


class Counter(nn.Module):
    """Counts its passes in Python, and may be random besides."""

    def __init__(self, noise):
        super().__init__()
        self.head, self.passes, self.noise = nn.Linear(4, 3).double(), 0, noise

    def forward(self, x):
        self.passes += 1
        return self.head(x + self.noise * torch.randn_like(x))


@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_a_number_written_in_forward_is_no_change(microbatch_size):
    model, batch = Counter(0.0), (torch.randn(8, 4).double(), torch.arange(8) % 3)
    operator = HessianOperator(model, F.cross_entropy, batch, microbatch_size=microbatch_size)
    v = torch.ones(operator.size).double()
    operator @ v
    kept, snapshot = operator._kept, operator._snapshot
    operator @ v
    assert operator._kept is kept
    assert operator._snapshot is snapshot
    model.train().eval()
    operator @ v
    assert operator._kept is kept


@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_nor_does_it_hide_a_random_loss(microbatch_size):
    batch = torch.randn(8, 4).double(), torch.arange(8) % 3
    operator = HessianOperator(
        Counter(1.0), F.cross_entropy, batch, microbatch_size=microbatch_size
    )
    with pytest.raises(HessianFlowError, match="switch off dropout"):
        operator @ torch.ones(operator.size).double()


def test_options_of_a_partial_are_watched():
    problem = classification(mlp((4, 5, 3)), (4,), 10, 3)
    weight = torch.tensor([1.0, 2.0, 3.0]).double()
    loss = functools.partial(F.cross_entropy, weight=weight, label_smoothing=0.0)
    operator = HessianOperator(problem.model, loss, problem.pair)
    v = torch.ones(operator.size).double()
    operator @ v
    weight.numpy()[0] = 7.0
    torch.testing.assert_close(operator @ v, HessianOperator(problem.model, loss, problem.pair) @ v)


TYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]


@pytest.mark.parametrize("size", [3, 40_000, 2_500_000])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
def test_a_snapshot_sees_one_pair_of_values_change_places(size, dtype):
    """At any length: short tensors are summed up together, long ones in chunks."""
    holder = nn.Module()
    values = torch.zeros(size)
    values[0], values[-1] = 1.0, -3.0
    holder.register_buffer("values", values.to(dtype))
    snapshot = Snapshot(holder, None, None)
    assert snapshot.is_current()
    holder.values.data[[0, -1]] = (
        holder.values.data[[-1, 0]] if dtype != torch.bool else torch.tensor([False, True])
    )
    assert not snapshot.is_current()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_a_snapshot_of_anything_a_model_may_hold():
    holder = nn.Linear(2, 2)
    holder.sixteen = nn.Parameter(torch.ones(3, dtype=torch.float16))
    holder.small = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)
    holder.odd = nn.Parameter(torch.ones(5).to(torch.float8_e5m2), requires_grad=False)
    holder.empty = nn.Parameter(torch.ones(0, 3))
    for name, buffer in {
        "expanded": torch.ones(1, 3).expand(4, 3),
        "gaps": torch.randn(6, 6)[:, ::2],
        "coo": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "nan": torch.tensor(float("nan")),
        "mask": torch.full((3, 3), float("-inf")).triu(1),
    }.items():
        holder.register_buffer(name, buffer)
    with torch.inference_mode():
        holder.register_buffer("made_in_inference_mode", torch.ones(2))
    snapshot = Snapshot(holder, F.mse_loss, {"nested": [torch.ones(2), "text"]})
    assert snapshot.is_current()
    for name in ("sixteen", "gaps", "last"):
        getattr(holder, name).data[0] += 1
        assert not snapshot.is_current(), name
        snapshot = Snapshot(holder, F.mse_loss, {"nested": [torch.ones(2), "text"]})
    holder.coo.coalesce()._values().data.mul_(2)
    assert not Snapshot(holder, None, None).has_values_of(snapshot)


class Observing(nn.Module):
    """Counts in a buffer that nothing depends on, or that the outputs are multiplied by."""

    def __init__(self, uses):
        super().__init__()
        self.layer, self.uses, self.forwards = nn.Linear(4, 3).double(), uses, 0
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer("largest", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.forwards += 1
        self.seen += len(x)
        # as observers of quantisation do
        self.largest.copy_(torch.maximum(self.largest, x.detach().abs().max()))
        outputs = self.layer(x)
        return outputs * outputs * self.largest if self.uses else outputs


@pytest.mark.parametrize("uses", [False, True])
def test_a_buffer_written_in_forward(uses):
    problem = classification(initialised(Observing(uses), 0), (4,), 9, 3)
    operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    v = torch.randn(operator.size, generator=torch.Generator().manual_seed(0)).double()
    products = [operator @ v for _ in range(10)]
    assert all(torch.equal(product, products[0]) for product in products)
    fixed = problem.inputs.abs().max()

    def loss(weight, bias):
        outputs = problem.inputs @ weight.view(3, 4).T + bias
        return problem.loss_fn(outputs * outputs * fixed if uses else outputs, problem.targets)

    layer = problem.model.layer
    expected = torch.autograd.functional.hvp(
        loss, (layer.weight.detach().reshape(-1), layer.bias.detach()), (v[:12], v[12:])
    )[1]
    torch.testing.assert_close(products[0], torch.cat(expected))
    assert float(problem.model.seen) == float(problem.model.largest) == 0
    if not uses:
        assert problem.model.forwards == 2  # where the graph saved the buffer, it cannot be kept


def test_release_is_no_random_loss():
    """What nobody can watch (an attribute in Python) has changed; release() says so."""
    problem = classification(mlp((4, 5, 3)), (4,), 10, 3)
    factor = [1.0]
    operator = HessianOperator(
        problem.model, lambda o, t: factor[0] * F.cross_entropy(o, t), problem.pair
    )
    v = torch.ones(operator.size).double()
    before = operator @ v
    factor[0] = 2.0
    operator.release()
    torch.testing.assert_close(operator @ v, 2 * before)


class Quantised(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        source = torch.Generator().manual_seed(0)
        self.frozen = nn.Parameter(
            torch.randn(5, 4, generator=source).mul(3).to(dtype), requires_grad=False
        )
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(x @ (self.frozen.float() * 0.2).T))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.bool,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
def test_frozen_weights_of_any_type(dtype):
    """The oracle computes with the same numbers held in float32."""
    model = initialised(Quantised(dtype), 0)
    twin = initialised(Quantised(torch.float32), 0)
    twin.frozen.data = model.frozen.data.float()
    twin.head.load_state_dict(model.head.state_dict())
    problem = classification(model, (4,), 9, 3)
    inputs = problem.inputs.float()
    found = CurvatureProbe(model, problem.loss_fn, (inputs, problem.targets), tol=1e-4)()
    expected = HessianOperator(
        twin, problem.loss_fn, (inputs, problem.targets), params="head"
    ).dense()
    assert found.eigenvalue == pytest.approx(float(torch.linalg.eigvalsh(expected)[-1]), rel=1e-3)


class Bag(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.table, self.head = nn.Embedding(10, 4, sparse=sparse), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.table(ids)).mean(1))


def test_sparse_gradients():
    ids, targets = torch.randint(0, 10, (12, 5)), torch.randint(0, 3, (12,))
    model, twin = (initialised(Bag(sparse).double(), 0) for sparse in (True, False))
    for kind in (HessianOperator, GGNOperator, FisherOperator):
        found = kind(model, F.cross_entropy, (ids, targets), check_product=True).dense()
        torch.testing.assert_close(found, kind(twin, F.cross_entropy, (ids, targets)).dense())


class Graph(nn.Module):
    def __init__(self, adjacency):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("adjacency", adjacency)

    def forward(self, x):
        hidden = torch.sparse.mm(x, torch.eye(4)) if x.layout != torch.strided else x
        return self.layer(self.adjacency @ hidden)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_buffers_and_inputs(layout):
    dense = (torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) > 0.7).float()
    x, targets = torch.randn(12, 4).relu(), torch.randint(0, 3, (12,))
    plain = initialised(Graph(dense), 0)
    expected = HessianOperator(plain, F.cross_entropy, (x, targets)).dense()
    model = initialised(Graph(dense.to_sparse(layout=layout)), 0)
    for inputs in (x, x.to_sparse(layout=layout)):
        operator = HessianOperator(model, F.cross_entropy, (inputs, targets))
        torch.testing.assert_close(operator.dense(), expected)
