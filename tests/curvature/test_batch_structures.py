"""The matrix of a batch does not depend on what holds its tensors, nor on how it is cut.

Oracle: the dense Hessian that `torch.func` finds for the loss of the whole batch, written out
without any batch.
"""

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from hessianflow.curvature import CurvatureProbe, FisherOperator, HessianOperator
from hessianflow.distributed.curvature import shard
from hessianflow.interfaces import HessianFlowError

N = 12
SCALE = torch.linspace(0.5, 1.5, 3).double()


@dataclass
class Record:
    x: Tensor
    name: str = "record"


class Net(nn.Module):
    """A linear map of whatever holds x, each output scaled by what all examples share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3).double()

    def forward(self, part: Any) -> Tensor:
        if isinstance(part, Tensor):
            return self.linear(part)
        x = part.x if isinstance(part, Record) else part["x"]
        return self.linear(x) * (
            part["scale"] if not isinstance(part, Record) and "scale" in part else 1
        )


def problem() -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(1)
    return Net(), torch.randn(N, 4).double(), torch.randint(3, (N,))


def dense(scale: Tensor | float) -> Tensor:
    net, x, y = problem()

    def loss(flat: Tensor) -> Tensor:
        weight, bias = flat[:12].view(3, 4), flat[12:]
        return cross_entropy((x @ weight.T + bias) * scale, y)

    flat = torch.cat([net.linear.weight.detach().flatten(), net.linear.bias.detach()])
    return torch.autograd.functional.hessian(loss, flat)


@pytest.mark.parametrize("size", [None, 1, 5])
@pytest.mark.parametrize(
    ("inputs", "scale"),
    [
        (lambda x: {"x": x}, 1.0),
        (lambda x: UserDict(x=x), 1.0),
        (lambda x: Record(x), 1.0),
        (lambda x: {"x": x, "scale": SCALE[None], "names": ["a"] * N}, SCALE),
        (lambda x: UserDict(scale=torch.tensor(2.0).double(), x=x), 2.0),
    ],
)
def test_inputs_in_any_holder_give_the_matrix_of_the_whole(inputs, scale, size):
    net, x, y = problem()
    found = HessianOperator(net, cross_entropy, (inputs(x), y), microbatch_size=size).dense()
    torch.testing.assert_close(found, dense(scale), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [None, 1, 5])
@pytest.mark.parametrize("make", [dict, UserDict])
@pytest.mark.parametrize("several", [False, True])
def test_one_mapping_as_the_batch(make, size, several):
    net, x, y = problem()
    batch = make(temperature=torch.tensor(0.5).double(), x=x, y=y, name="all")
    data = [make(batch, x=x[:5], y=y[:5]), make(batch, x=x[5:], y=y[5:])] if several else batch
    loss = lambda model, b: cross_entropy(model(b["x"]) / b["temperature"], b["y"])  # noqa: E731
    operator = HessianOperator(net, loss, data, microbatch_size=size)
    torch.testing.assert_close(operator.dense(), dense(2.0), rtol=1e-12, atol=1e-14)
    assert operator.num_examples == N
    assert CurvatureProbe(net, loss, batch, microbatch_size=size)().num_examples == N


def test_entries_of_another_length_count_whole_and_are_not_cut():
    """In one pass nothing is cut, so prototypes of any number are right; microbatches are refused
    by name."""
    net, x, y = problem()
    batch = {"p": torch.ones(100, 3).double() / 50, "x": x, "y": y}
    loss = lambda model, b: cross_entropy(model(b["x"]) * b["p"].sum(0), b["y"])  # noqa: E731
    whole = HessianOperator(net, loss, batch)
    torch.testing.assert_close(whole.dense(), dense(2.0), rtol=1e-12, atol=1e-14)
    assert whole.num_examples == N
    with pytest.raises(
        HessianFlowError,
        match=rf"batch\['p'\] has 100 rows in a batch of {N} examples and cannot be cut",
    ):
        HessianOperator(net, loss, batch, microbatch_size=8).dense()


def test_fisher_takes_targets_that_hold_more_than_rows():
    net, x, y = problem()
    structured = {"labels": y, "smoothing": torch.tensor(0.125).double()}
    loss = lambda o, t: cross_entropy(o, t["labels"], label_smoothing=float(t["smoothing"]))  # noqa: E731
    plain = FisherOperator(
        net, lambda o, t: cross_entropy(o, t, label_smoothing=0.125), (x, y)
    ).dense()
    for size in (None, 5):
        found = FisherOperator(net, loss, (x, structured), microbatch_size=size).dense()
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-14)


class Rank:
    def __init__(self, rank: int) -> None:
        self.rank, self.world_size = rank, 3


def test_ranks_share_out_the_rows_and_keep_the_rest():
    _, x, y = problem()
    batch = (UserDict(x=x, mask=torch.ones(1, 4, 4), names=list(range(N))), y)
    parts = [shard(batch, Rank(rank)) for rank in range(3)]  # type: ignore[arg-type]
    assert [count for _, count in parts] == [4, 4, 4]
    assert torch.equal(torch.cat([inputs["x"] for (inputs, _), _ in parts]), x)
    assert [n for (inputs, _), _ in parts for n in inputs["names"]] == list(range(N))
    assert all(inputs["mask"].shape == (1, 4, 4) for (inputs, _), _ in parts)


def test_a_probe_says_at_once_that_a_loader_is_no_batch():
    net, x, y = problem()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4)
    calls = []
    probe = CurvatureProbe(net, lambda o, t: calls.append(1) or mse_loss(o, t), loader)
    with pytest.raises(
        HessianFlowError, match=r"found none in a DataLoader: pass batches, such as next\(iter"
    ):
        probe()
    assert not calls
