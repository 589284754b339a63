"""Settings: what is filled in, what survives being written down, and that a default is stated
once."""

import inspect
import json
from typing import Any

from hessianflow.config import TrainConfig, from_dict, resolve, to_dict
from hessianflow.control import AdaBatch, CriticalBatch


def test_timed_stages_are_planned_for_the_epochs_and_the_cap() -> None:
    """A twelfth, a sixth and a third of 24 epochs are 2, 4 and 8; of 30: 2.5, 5 and 10, the first
    rounded up."""
    planned = resolve(
        TrainConfig(
            data="cifar10", controller="timed", epochs=24, batch_size=128, max_batch_size=2048
        )
    )
    assert (planned.stages, planned.decay_from) == (((2, 256), (4, 512), (8, 1024)), 8)
    assert planned.schedule == "constant"
    capped = resolve(
        TrainConfig(controller="timed", epochs=30, batch_size=32, max_batch_size=100, decay_from=20)
    )
    assert (capped.stages, capped.decay_from) == (((3, 64), (5, 100), (10, 100)), 20)
    by_hand = resolve(TrainConfig(controller="timed", stages=((3, 64),)))
    assert (by_hand.stages, by_hand.decay_from) == (((3, 64),), None)
    assert resolve(TrainConfig(controller="critical")).stages is None


def test_readings_of_real_images_have_a_budget_where_none_is_given() -> None:
    def budget(**given: Any) -> float | None:
        return resolve(TrainConfig(**given)).curvature_budget

    assert budget(data="cifar10") == 0.01
    assert budget(data="cifar10", curvature_budget=100.0) == 100
    assert budget(data="digits") is budget(data="fake") is None
    assert budget(data="cifar10", controller="dual-batch") is None


def test_settings_survive_being_written_down() -> None:
    config = resolve(TrainConfig(controller="timed"))
    assert from_dict(json.loads(json.dumps(to_dict(config))), "here") == config


def test_defaults_are_those_of_the_controllers() -> None:
    config = resolve(TrainConfig(controller="critical"))
    critical = inspect.signature(CriticalBatch).parameters
    for name in ("edge_share", "loss_power", "excess_power"):
        assert getattr(config, name) == critical[name].default
    others = resolve(TrainConfig(controller="critical", optimizer="adamw"))
    assert others.edge_share == 0, "the stable rate is that of SGD"
    assert config.every_epochs == inspect.signature(AdaBatch).parameters["every_epochs"].default
