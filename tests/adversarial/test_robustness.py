"""Accuracy under attack on a model with known margins; Wilson's interval against its defining
equation."""

from functools import partial
from statistics import NormalDist

import pytest
import torch
from torch import nn

from hessianflow.adversarial import OverfittingAlarm, fgsm, pgd, robust_accuracy, wilson_interval


class Threshold(nn.Module):
    """Class 1 iff x > 0; the margin of an example is |x|."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[-1.0, 1.0]]))

    def forward(self, x):
        return x @ self.weight


X = torch.tensor([[-0.5], [-0.15], [0.05], [0.3], [0.2], [-0.1]])
Y = torch.tensor([0, 0, 1, 1, 0, 1])  # the last two are wrong to begin with


def test_accuracy_counts_margins():
    """Correct examples have margins .5, .15, .05, .3: an eps of .1 leaves three, .2 leaves two."""
    attacks = {
        "small": partial(fgsm, eps=0.1, value_range=None),
        "large": partial(pgd, eps=0.2, value_range=None),
    }
    result = robust_accuracy(Threshold(), (X, Y), attacks)
    assert {name: r.correct for name, r in result.items()} == {
        "clean": 4,
        "small": 3,
        "large": 2,
        "worst": 2,
    }
    assert result["small"].value == 0.5
    assert result["small"].low < 0.5 < result["small"].high


def test_worst_is_counted_per_example():
    """Two targetless attacks that each break a different example."""
    attacks = {
        "first": lambda model, x, y: torch.where(torch.arange(len(x))[:, None] == 0, -x, x),
        "second": lambda model, x, y: torch.where(torch.arange(len(x))[:, None] == 1, -x, x),
    }
    result = robust_accuracy(Threshold(), (X, Y), attacks)
    assert [result[n].correct for n in ("first", "second", "worst")] == [3, 3, 2]


def test_batches_add_up_and_the_model_is_as_found():
    model = Threshold().train()
    attacks = {"fgsm": partial(fgsm, eps=0.1, value_range=None)}
    whole = robust_accuracy(model, (X, Y), attacks)
    assert robust_accuracy(model, [(X[:4], Y[:4]), (X[4:], Y[4:])], attacks) == whole
    assert set(whole) == {"clean", "fgsm"}
    assert model.training


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (7, 10), (812, 1000)])
def test_wilson_ends_solve_the_score_equation(correct, total):
    """By definition the ends p satisfy (k/n - p)^2 = z^2 p (1 - p) / n."""
    z = NormalDist().inv_cdf(0.975)
    low, high = wilson_interval(correct, total)
    for p in (low, high):
        assert (correct / total - p) ** 2 == pytest.approx(z * z * p * (1 - p) / total, abs=1e-12)
    assert 0 <= low <= correct / total <= high <= 1
    assert high - low > 0


def test_alarm_rings_once_when_pgd_collapses_under_rising_fgsm():
    alarm = OverfittingAlarm()
    assert [
        bool(alarm.update(f, p))
        for f, p in [(0.3, 0.2), (0.4, 0.3), (0.5, 0.28), (0.9, 0.1), (0.95, 0.0)]
    ] == [
        False,
        False,
        False,
        True,
        False,
    ]
    assert alarm.update(0.4, 0.29) == ""
    resumed = OverfittingAlarm()
    resumed.load_state_dict(alarm.state_dict())
    message = resumed.update(0.9, 0.05)
    assert message == alarm.update(0.9, 0.05)
    assert message.startswith(
        "catastrophic overfitting: accuracy under PGD fell from 30.0% to 5.0% while that under FGSM"
    )


def test_alarm_is_silent_when_both_fall():
    """A diverging run is another trouble: FGSM accuracy falls too."""
    alarm = OverfittingAlarm()
    assert [alarm.update(f, p) for f, p in [(0.5, 0.4), (0.1, 0.1)]] == ["", ""]


def test_bad_input_is_named():
    model = Threshold()
    with pytest.raises(ValueError, match="attacks must not be called 'worst'"):
        robust_accuracy(model, (X, Y), {"worst": fgsm})
    with pytest.raises(ValueError, match="is the data empty"):
        robust_accuracy(model, [], {})
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match=r"confidence must lie between 0 and 1, got 1\.0"):
        wilson_interval(1, 2, 1.0)
    with pytest.raises(ValueError, match=r"collapse must lie between 0 and 1, got 1\.5"):
        OverfittingAlarm(1.5)
