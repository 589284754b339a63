"""Our products and eigenvalues against independent libraries, on a net with batch normalisation."""

import numpy as np
import pytest
import torch
from peers import library
from problems import classification, conv_net, train
from torch import nn

from hessianflow.curvature import FisherOperator, GGNOperator, HessianOperator, top_eigenpairs


@pytest.fixture(scope="module")
def problem():
    made = classification(conv_net(), (1, 8, 8), 40)
    train(made, 20)
    return made


@pytest.fixture(scope="module")
def curvlinops():
    return library("curvlinops")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (HessianOperator, "HessianLinearOperator"),
        (GGNOperator, "GGNLinearOperator"),
        (FisherOperator, "EFLinearOperator"),
    ],
)
def test_products_agree_with_curvlinops(problem, curvlinops, ours, theirs):
    model = problem.model.eval()
    pairs = list(zip(problem.inputs.split(25), problem.targets.split(25), strict=True))
    peer = getattr(curvlinops, theirs)(
        model, nn.CrossEntropyLoss(), list(model.parameters()), pairs, check_deterministic=False
    )
    operator = ours(model, problem.loss_fn, pairs)
    v = torch.randn(operator.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(operator @ v, peer @ v, rtol=1e-9, atol=1e-11)


def test_eigenvalues_agree_with_arpack(problem):
    from scipy.sparse.linalg import eigsh

    operator = HessianOperator(problem.model, problem.loss_fn, problem.pair)
    for which in ("LM", "LA", "SA"):
        theirs = eigsh(operator.to_scipy(), k=3, which=which, tol=1e-10, return_eigenvectors=False)
        ours = top_eigenpairs(operator, 3, which=which, tol=1e-8, seed=0).values
        np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=1e-7)


def test_finite_differences_would_mislead_on_relu(problem):
    """On a kinked net in float32 a difference quotient is no product; ours still is."""
    single = classification(conv_net(dtype=torch.float32), (1, 8, 8), 40)
    train(single, 20)
    double = classification(conv_net(), (1, 8, 8), 40)
    double.model.load_state_dict(
        {
            k: v.double() if v.is_floating_point() else v
            for k, v in single.model.state_dict().items()
        }
    )
    operator = HessianOperator(single.model, single.loss_fn, single.pair)
    exact = HessianOperator(double.model, double.loss_fn, double.pair)
    found, truth = top_eigenpairs(operator, seed=0), top_eigenpairs(exact, tol=1e-8, seed=0)
    assert found.values.item() == pytest.approx(truth.values.item(), rel=1e-3)
