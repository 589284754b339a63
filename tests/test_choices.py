"""What the names in a configuration stand for."""

import pytest
from torch import nn

from hessianflow.choices import build_optimizer
from hessianflow.config import TrainConfig, resolve


@pytest.mark.parametrize(("correction", "form"), [(False, "paper"), (True, "outside")])
def test_momentum_correction_takes_the_rate_out_of_the_velocity_of_lars(correction: bool, form: str):
    config = resolve(TrainConfig(optimizer="lars", momentum_correction=correction))
    assert build_optimizer(config, nn.Linear(2, 2)).param_groups[0]["form"] == form
