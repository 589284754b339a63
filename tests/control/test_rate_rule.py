import pytest

from hessianflow import CurvatureReading, HessianFlowError, Progress
from hessianflow.control import ABSA
from hessianflow.control.rate_rule import RateRule


@pytest.mark.parametrize(
    ("rule", "cap", "expected"),
    [
        ("linear", None, [1, 2, 4, 8]),
        ("linear", 3, [1, 2, 3, 3]),
        ("sqrt", None, [1, 2**0.5, 2, 8**0.5]),
        ("none", None, [1] * 4),
    ],
)
def test_factor_follows_the_rule_whatever_the_controller_wants(rule, cap, expected):
    controller = RateRule(ABSA(8, 64, patience=None), rule, max_factor=cap)
    factors = [controller.decision.lr_factor]
    assert controller.needs == {"eigenvalue"}
    for epoch, eigenvalue in enumerate((100.0, 50.0, 25.0, 12.0), start=1):
        progress = Progress(epoch, 100 * epoch, 0, 100, 9)
        assert controller.is_due(progress)
        controller.update(progress, CurvatureReading(eigenvalue, 0.0, 1, True))
        if epoch > 1:
            factors.append(controller.decision.lr_factor)
    assert controller.decision.batch_size == 64
    assert factors == pytest.approx(expected)
    again = RateRule(ABSA(8, 64, patience=None), rule, max_factor=cap)
    again.load_state_dict(controller.state_dict())
    assert again.decision == controller.decision


def test_bad_rule_and_cap():
    with pytest.raises(
        HessianFlowError, match="lr_rule must be one of linear, sqrt, none, got 'cube'"
    ):
        RateRule(ABSA(8, 64), "cube")  # type: ignore[arg-type]
    with pytest.raises(HessianFlowError, match="max_factor"):
        RateRule(ABSA(8, 64), "linear", max_factor=0)
