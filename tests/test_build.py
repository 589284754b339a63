"""What the settings of a run become."""

import json
from dataclasses import replace

import pytest
import torch

from hessianflow.choices import build_optimizer
from hessianflow.config import TrainConfig
from hessianflow.curvature.probe import GRADIENTS_PER_PRODUCT
from hessianflow.measurements import FLOAT32_PER_16_BIT, build_probe
from hessianflow.parts import build_parts, load_config
from hessianflow.resolve import resolve


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        (
            {"controller": "critical", "schedule": "cooldown", "decay_from": 7, "edge_share": 0.5},
            {"edge_share": 0.5, "excess_power": 0.25},
        ),
        (
            {"controller": "critical", "edge_share": 0, "excess_power": 0.5, "norm_mode": "eval"},
            {"edge_share": None, "excess_power": 0.5},
        ),
        ({"controller": "absa", "patience": 0, "milestones": [4]}, {"patience": None}),
        ({"patience": 3, "momentum": 0.9, "staleness": 1}, {"patience": 3}),
    ],
)
def test_runs_in_the_words_of_an_earlier_release_go_on_as_they_began(tmp_path, recorded, expected):
    """Options stood beside all other settings, and 0 switched off what null does today."""
    settings = {"data": "fake", "epochs": 10, "adversary": "fgsm", **recorded}
    (tmp_path / "config.json").write_text(json.dumps({"settings": settings}))
    config = load_config(tmp_path)
    assert expected.items() <= config.controller.options.items()
    if "decay_from" in recorded:
        assert config.schedule.options["decay_from"] == 7
    if "milestones" in recorded:
        assert config.schedule.options["milestones"] == (4,)


def test_absa_reads_the_hessian_itself_whatever_the_optimizer():
    """Its published rule is about the eigenvalue of the largest magnitude; others get the edge."""
    told = {}
    for controller in ("absa", "fixed"):
        config = resolve(
            TrainConfig(
                data="fake",
                train_examples=64,
                test_examples=8,
                batch_size=8,
                probe_examples=8,
                epochs=1,
                optimizer="adamw",  # type: ignore[arg-type]
                controller=controller,  # type: ignore[arg-type]
            )
        )
        parts = build_parts(config)
        optimizer = build_optimizer(config, parts.model)
        inputs, targets = parts.train.sample(8)
        torch.nn.functional.cross_entropy(parts.model(inputs), targets).backward()
        optimizer.step()
        probe = build_probe(config, parts, optimizer=optimizer)
        assert probe is not None
        reading = probe()
        told[controller] = (reading.matrix, "edge_share" in reading.details)
    assert told == {"absa": ("Hessian", False), "fixed": ("preconditioned Hessian", True)}


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
