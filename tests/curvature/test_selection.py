"""Which parameters a selection means, in whatever form it comes."""

import itertools

import pytest
import torch
from problems import classification, mlp
from torch import nn

from hessianflow.curvature import CurvatureProbe, HessianOperator
from hessianflow.interfaces import HessianFlowError

WEIGHTS = ("0.weight", "2.weight", "4.weight")


def problem():
    return classification(mlp((5, 6, 6, 4)), (5,), 12, 4)


def names(params):
    made = problem()
    return HessianOperator(made.model, made.loss_fn, made.pair, params=params(made.model)).names


@pytest.mark.parametrize(
    "params",
    [
        lambda m: [p for n, p in m.named_parameters() if "weight" in n],
        lambda m: (p for n, p in m.named_parameters() if "weight" in n),
        lambda m: filter(lambda p: p.ndim == 2, m.parameters()),
        lambda m: itertools.chain([m[0].weight], (m[i].weight for i in (2, 4))),
        lambda m: {"*.weight": None}.keys(),
        lambda m: ["0.weight", m[2].weight, "4.weight"],
        lambda m: nn.ParameterList([m[0].weight, m[2].weight, m[4].weight]),
    ],
    ids=["list", "generator", "filter", "chain", "keys", "mixed", "parameter_list"],
)
def test_every_form_means_the_same(params):
    assert names(params) == WEIGHTS


def test_one_tensor_is_one_parameter_and_not_its_rows():
    assert names(lambda m: m[0].weight) == ("0.weight",)
    assert names(lambda m: m[4].parameters()) == ("4.weight", "4.bias")


def test_a_probe_keeps_the_selection_for_all_calls():
    """A generator would be used up after the first."""
    made = problem()
    by_list = CurvatureProbe(
        made.model, made.loss_fn, made.pair, params=list(made.model[2].parameters())
    )
    by_generator = CurvatureProbe(
        made.model, made.loss_fn, made.pair, params=made.model[2].parameters()
    )
    for _ in range(3):
        assert by_generator().eigenvalue == by_list().eigenvalue


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            lambda m: ["0", "haed"],
            "params: no trainable parameter matches 'haed'; names are like 0.weight, 0.bias",
        ),
        (
            lambda m: [m[0].weight, torch.ones(3, 2)],
            r"matches the tensor of shape \[3, 2\]; names are like",
        ),
        (
            lambda m: dict(m.named_parameters()).items(),
            "params must be name patterns or parameters, got a tuple",
        ),
        (
            lambda m: m[0],
            "got a Linear; pass names, or module.parameters()",
        ),
        (lambda m: iter([]), "params: no trainable parameter matches the selection"),
        (lambda m: 3, "got a int"),
    ],
    ids=["slip", "foreign", "pairs", "module", "empty", "number"],
)
def test_what_chooses_nothing_is_refused(params, message):
    with pytest.raises(HessianFlowError, match=message):
        names(params)


def test_frozen_ones_in_a_selection_are_constants():
    made = problem()
    made.model[0].requires_grad_(False)
    operator = HessianOperator(made.model, made.loss_fn, made.pair, params=made.model.parameters())
    assert operator.names == ("2.weight", "2.bias", "4.weight", "4.bias")
