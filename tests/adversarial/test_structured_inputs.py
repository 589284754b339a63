"""Inputs in a structure are refused in one line by whatever perturbs inputs; targets may be
structured."""

from collections import UserDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessianflow as hf
from hessianflow.adversarial import (
    FGSM,
    PGD,
    ConcurrentAdversary,
    GradientReuse,
    fgsm,
    pgd,
    robust_accuracy,
)
from hessianflow.adversarial.input_hessian import InputHessian
from hessianflow.adversarial.monitors import InputCurvature, RobustnessWatch
from hessianflow.interfaces import HessianFlowError
from hessianflow.training import Reporting

X, Y = torch.rand(8, 4), torch.arange(8) % 3


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.table = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, part: Any) -> Tensor:
        return self.image(part["image"]) + self.table(part["table"])


MODEL = Two()


def reuse(inputs: Any) -> Any:
    batches = hf.data.DeviceBatches(X, Y, 4)
    next(iter(batches))
    return GradientReuse(batches, 0.1, value_range=None).attack(MODEL, inputs, Y[:4], 0.5)


ATTACKS: dict[str, Callable[[Any], Any]] = {
    "fgsm": lambda x: fgsm(MODEL, x, Y, 0.1, value_range=None),
    "pgd": lambda x: pgd(MODEL, x, Y, 0.1, value_range=None),
    "FGSM": lambda x: FGSM(0.1, value_range=None).perturb(MODEL, x, Y, 0.5),
    "PGD": lambda x: PGD(0.1, value_range=None).attack(MODEL, x, Y, 0.0),
    "concurrent": lambda x: ConcurrentAdversary(FGSM(0.1, value_range=None)).attack(
        MODEL, x, Y, 1.0
    ),
    "reuse": reuse,
    "input Hessian": lambda x: InputHessian(MODEL, x, Y),
    "robustness": lambda x: robust_accuracy(
        MODEL, (x, Y), {"fgsm": partial(fgsm, eps=0.1, value_range=None)}
    ),
    "watch": lambda x: RobustnessWatch(MODEL, (x, Y), 0.1, value_range=None),
    "input curvature": lambda x: InputCurvature(MODEL, (x, Y), lambda _: {}),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        ({"image": X, "table": X[:, :2]}, "a dict"),
        (UserDict(image=X, table=X[:, :2]), "a UserDict"),
    ],
)
def test_structured_inputs_are_refused(name: str, inputs: Any, kind: str) -> None:
    with pytest.raises(
        HessianFlowError, match=f"^inputs must be one tensor to be perturbed, got {kind}$"
    ):
        ATTACKS[name](inputs)


def test_lists_and_arrays_are_refused_too() -> None:
    for inputs, kind in (([X, X], "a list"), (X.numpy(), "an ndarray")):
        with pytest.raises(
            HessianFlowError, match=f"^inputs must be one tensor to be perturbed, got {kind}$"
        ):
            ATTACKS["FGSM"](inputs)


def test_targets_of_twins_and_of_accuracies_must_be_one_tensor() -> None:
    with pytest.raises(
        HessianFlowError, match="targets must be one tensor to have adversarial twins, got a dict"
    ):
        ConcurrentAdversary(FGSM(0.1, value_range=None)).attack(MODEL, X, {"y": Y}, 1.0)  # type: ignore[arg-type]
    with pytest.raises(
        HessianFlowError, match="targets must be one tensor of class numbers, got a dict"
    ):
        robust_accuracy(nn.Linear(4, 3), (X, {"y": Y}), {})
    with pytest.raises(
        HessianFlowError, match=r"must be a pair \(inputs, targets\), got a dict of 2"
    ):
        robust_accuracy(MODEL, {"x": X, "y": Y}, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_structured_targets_are_cut_with_the_rows_that_are_attacked(
    microbatch_size: int | None,
) -> None:
    """The oracle attacks plain targets with the loss of those; an entry for all examples and a list
    go along."""
    model = nn.Linear(4, 3)

    def structured_loss(outputs: Tensor, targets: Any) -> Tensor:
        assert [int(name) for name in targets["names"]] == targets["y"].tolist()
        return cross_entropy(outputs * targets["scale"], targets["y"])

    targets = {"scale": torch.tensor(2.0), "y": Y, "names": [str(int(y)) for y in Y]}
    plain = FGSM(0.1, value_range=None, loss_fn=lambda o, t: cross_entropy(2 * o, t))
    structured = FGSM(0.1, value_range=None, loss_fn=structured_loss)
    for share in (0.25, 0.5, 1.0):  # the third call checks the gradient besides
        found = structured.perturb(model, X, targets, share, microbatch_size)
        assert torch.equal(found, plain.perturb(model, X, Y, share, microbatch_size))
        assert (found != X).any(1).sum() == 8 * share


def test_the_trainer_refuses_before_the_first_step() -> None:
    data = [({"image": torch.rand(4), "table": torch.rand(2)}, n % 3) for n in range(32)]
    model = Two()
    before = [p.detach().clone() for p in model.parameters()]
    trainer = hf.AdaptiveBatchTrainer(
        model,
        hf.data.AdaptiveBatches(data, 8),  # type: ignore[arg-type]
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=cross_entropy,
        controller=hf.control.FixedBatch(8),
        adversary=FGSM(0.1, share=0.5, value_range=None),
        epochs=1,
        reporting=Reporting(show_progress=False),
    )
    with pytest.raises(
        HessianFlowError, match="inputs must be one tensor to be perturbed, got a dict"
    ):
        trainer.fit()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
