"""What the settings of a run become."""

import json
from dataclasses import replace

import pytest

from hessianflow.build import FLOAT32_PER_16_BIT, build_parts, build_probe, load_config
from hessianflow.config import TrainConfig, resolve
from hessianflow.curvature.probe import GRADIENTS_PER_PRODUCT


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        (
            {"controller": "critical", "schedule": "cooldown", "decay_from": None, "epochs": 10},
            (0.0, 4),
        ),
        (
            {"controller": "critical", "schedule": "cooldown", "decay_from": 7, "epochs": 10},
            (0.0, 7),
        ),
        ({"controller": "absa", "schedule": "multistep", "epochs": 10}, (0.25, None)),
        (
            {"controller": "critical", "schedule": "cooldown", "epochs": 10, "excess_power": 0.5},
            (0.5, None),
        ),
    ],
)
def test_runs_of_earlier_releases_go_on_as_they_began(tmp_path, recorded, expected):
    """Before batch and rate could part, a cooldown began after a third of the run, and nobody wrote
    that down."""
    (tmp_path / "config.json").write_text(json.dumps({"settings": {"data": "fake", **recorded}}))
    config = load_config(tmp_path)
    assert (config.excess_power, config.decay_from) == expected


@pytest.mark.parametrize(("precision", "price"), [("float32", 1.0), ("bf16", FLOAT32_PER_16_BIT)])
def test_a_reading_is_dearer_beside_training_in_16_bits(precision: str, price: float):
    """Products are in float32 whatever the precision, so that the same budget allows fewer of
    them."""
    config = resolve(
        TrainConfig(data="fake", train_examples=64, test_examples=8, batch_size=8, probe_examples=8)
    )
    config = replace(config, precision=precision, curvature_budget=0.1)  # type: ignore[arg-type]
    probe = build_probe(config, build_parts(config))
    assert probe is not None
    cost = (1 + GRADIENTS_PER_PRODUCT * probe().matvecs) * 8
    edge = 2 * cost * price / 0.1
    assert not probe.is_affordable(int(edge * 0.99))
    assert probe.is_affordable(int(edge * 1.01) + 1)
