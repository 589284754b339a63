"""Loss slices against closed forms and direct evaluation; overlap against its definition."""

import pytest
import torch
from problems import classification, mlp, train
from torch import nn

from hessianflow.curvature import HessianOperator, gradient_overlap, loss_landscape, top_eigenpairs
from hessianflow.interfaces import HessianFlowError


def quadratic():
    """loss = mean over outputs of w * (1, 2, 3) squared: a known bowl at w = 0."""
    model = nn.Linear(1, 3, bias=False).double()
    nn.init.zeros_(model.weight)
    scales = torch.tensor([1.0, 2.0, 3.0]).double()
    data = (torch.ones(4, 1).double(), torch.zeros(4).double())
    return HessianOperator(model, lambda o, t: (scales * o**2).sum(dim=1), data)


def test_a_parabola_along_each_eigenvector():
    operator = quadratic()
    pairs = top_eigenpairs(operator, 2, tol=1e-10, seed=0)
    slice_ = loss_landscape(operator, pairs.vectors, span=2.0, points=5)
    assert pairs.values.tolist() == pytest.approx([6.0, 4.0])
    assert slice_.offsets.tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0]
    a = slice_.offsets
    torch.testing.assert_close(slice_.losses, 3 * a[:, None] ** 2 + 2 * a[None, :] ** 2)
    # directions are scaled to length 1
    line = loss_landscape(operator, 5 * pairs.vectors[:, 0], points=3)
    torch.testing.assert_close(line.losses, torch.tensor([3.0, 0.0, 3.0]).double())


def test_filters_take_the_norms_of_the_weights_and_biases_stay():
    """Moving by +1 along the filter-normalised weights themselves doubles them, and leaves the
    biases."""
    problem = classification(mlp((5, 6, 4)), (5,), 20, 4)
    operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    direction = torch.cat([p.detach().reshape(-1) * 7 for p in operator.parameters])
    found = loss_landscape(operator, direction, points=3, normalise="filter").losses[2]
    with torch.no_grad():
        for parameter in problem.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    assert float(found) == pytest.approx(
        HessianOperator(problem.model, problem.loss_fn, problem.pair).mean_loss()
    )


def test_weights_are_as_found_also_when_the_loss_raises():
    problem = classification(mlp((5, 6, 4)), (5,), 20, 4)
    train(problem, 2)
    before = [p.detach().clone() for p in problem.model.parameters()]

    def loss(outputs, targets):
        raise KeyError("in the loss")

    for loss_fn in (problem.loss_fn, loss):
        operator = HessianOperator(problem.model, loss_fn, problem.pair)
        try:
            loss_landscape(operator, torch.ones(64, dtype=torch.float64), points=2)
        except KeyError:
            assert loss_fn is loss
        assert all(
            torch.equal(p, b) for p, b in zip(problem.model.parameters(), before, strict=True)
        )
        assert problem.model.training


def test_gradient_overlap_is_the_share_of_the_squared_norm():
    problem = classification(mlp((5, 6, 4)), (5,), 20, 4)
    operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    loss = problem.loss_fn(problem.model(problem.inputs), problem.targets)
    g = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(loss, list(problem.model.parameters()))]
    )
    vectors = torch.linalg.qr(torch.stack([g, torch.ones_like(g)], dim=1))[0]
    assert gradient_overlap(operator, vectors).tolist() == pytest.approx([1.0, 0.0], abs=1e-12)
    assert gradient_overlap(operator, torch.eye(64, dtype=torch.float64)).sum() == pytest.approx(
        1.0
    )
    assert gradient_overlap(quadratic(), torch.eye(3, dtype=torch.float64)).tolist() == [
        0.0,
        0.0,
        0.0,
    ]


@pytest.mark.parametrize(
    ("directions", "options", "message"),
    [
        (
            torch.ones(3),
            {"normalise": "layer"},
            "normalise must be one of unit, filter, got 'layer'",
        ),
        (
            torch.ones(3),
            {"points": 0},
            "points must be at least 1 and span positive, got 0 and 1.0",
        ),
        (
            torch.ones(3),
            {"span": 0.0},
            "points must be at least 1 and span positive, got 21 and 0.0",
        ),
        (
            torch.ones(3, 3),
            {},
            r"directions must have shape \[size\], \[size, 1\] or \[size, 2\], got \[3, 3\]",
        ),
        (torch.zeros(3), {}, r"a direction is zero \(normalise='unit'\)"),
        (torch.ones(4), {}, r"each direction must have shape \[3\], got \[4\]"),
    ],
)
def test_bad_arguments_are_refused(directions, options, message):
    with pytest.raises(HessianFlowError, match=message):
        loss_landscape(quadratic(), directions.double(), **options)
