"""The table of what has an effect where: complete, of choices that exist, and right for pairs
worked out by hand."""

from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest

from hessianflow.config import TrainConfig, resolve
from hessianflow.effects import EFFECTIVE, Above, AllBut, check_effects, is_ignored
from hessianflow.interfaces import HessianFlowError

ALWAYS = {
    *(
        "data",
        "train_examples",
        "test_examples",
        "model",
        "controller",
        "optimizer",
        "sam_rho",
        "batch_size",
    ),
    *(
        "max_batch_size",
        "epochs",
        "lr",
        "weight_decay",
        "schedule",
        "warmup_epochs",
        "microbatch_size",
    ),
    *(
        "norm_batch_size",
        "augment",
        "precision",
        "channels_last",
        "compile",
        "deterministic",
        "device",
        "threads",
    ),
    *(
        "seed",
        "keep_checkpoints",
        "run_dir",
        "tensorboard",
        "log_level",
        "plots",
        "resolution",
        "elastic",
    ),
}
"""Settings that every run looks at, or that hold whatever the others are."""


def test_every_setting_is_in_the_table_or_has_an_effect_everywhere():
    assert {field.name for field in fields(TrainConfig)} == ALWAYS | EFFECTIVE.keys()
    assert not ALWAYS & EFFECTIVE.keys()


def words(hint: Any) -> set[str]:
    return {part for part in get_args(hint) if isinstance(part, str)} | {
        word for part in get_args(hint) for word in words(part)
    }


def test_cases_are_made_of_settings_and_choices_that_exist():
    hints = get_type_hints(TrainConfig)
    for cases in EFFECTIVE.values():
        for name, values in (item for case in cases for item in case.items()):
            named = (
                values.names
                if isinstance(values, AllBut)
                else ()
                if isinstance(values, Above)
                else values
            )
            for value in named:
                assert value in words(hints[name]) or (
                    hints[name] is bool and value in (True, False)
                ), (name, value)


@pytest.mark.parametrize(
    ("settings", "ignored"),
    [
        ({"schedule": "cosine", "milestones": (3,)}, ["milestones"]),
        ({"schedule": "multistep", "milestones": (3,)}, []),
        ({"controller": "grow-instead-of-decay", "milestones": (3,), "lr_decay": 0.5}, []),
        ({"controller": "adabatch", "lr_decay": 0.5}, ["lr_decay"]),
        ({"controller": "fixed", "patience": 3}, ["patience"]),
        ({"controller": "abs", "patience": 3, "adversary": "pgd"}, ["adversary"]),
        ({"controller": "absa", "patience": 3, "adversary": "pgd"}, []),
        ({"adversary": "none", "adversarial_share": 0.5}, ["adversarial_share"]),
        ({"adversary": "none", "adversarial_share": 0.0}, []),
        ({"adversary": "pgd", "adversarial_share": 0.0}, ["adversary"]),
        ({"adversary": "none", "eps": 0.1}, ["eps"]),
        ({"adversary": "none", "eps": 0.1, "overfitting_alarm": True}, []),
        ({"optimizer": "adam", "momentum": 0.5}, ["momentum"]),
        ({"optimizer": "adam", "momentum": 0.0}, []),
        ({"optimizer": "adam", "controller": "critical", "momentum": 0.5}, ["momentum"]),
        ({"optimizer": "adam", "controller": "critical", "momentum": 0.5, "edge_share": 0.5}, []),
        ({"optimizer": "sgd", "trust_coefficient": 0.1}, ["trust_coefficient"]),
        ({"optimizer": "clars", "momentum_correction": True}, ["momentum_correction"]),
        ({"controller": "critical", "excess_power": 0.5, "loss_power": 0.0}, ["excess_power"]),
        ({"controller": "critical", "excess_power": 0.5}, []),
        ({"data_dir": "/somewhere"}, ["data_dir"]),
        ({"data": "cifar10", "data_dir": "/somewhere"}, []),
        ({"data": "cifar10", "loader_workers": 2}, ["loader_workers"]),
        ({"data": "folder", "loader_workers": 2, "image_size": 32}, []),
        ({"controller": "fixed", "curvature": "off", "probe_examples": 8}, ["probe_examples"]),
        (
            {
                "controller": "fixed",
                "curvature": "off",
                "probe_tolerance": 0.1,
                "input_curvature": True,
            },
            [],
        ),
        ({"max_rollbacks": 5}, ["max_rollbacks"]),
        ({"max_rollbacks": 5, "on_divergence": "rollback"}, []),
        ({"elastic": True, "checkpoint_examples": 100}, ["checkpoint_examples"]),
        ({"elastic": True, "ray_address": "auto"}, []),
        ({"controller": "dual-batch", "overfitting_alarm": True}, ["overfitting_alarm"]),
        ({"controller": "fixed", "max_batch_size": 64, "lr_rule": "sqrt"}, []),
    ],
    ids=lambda value: " ".join(map(str, value.items() if isinstance(value, dict) else value)),
)
def test_what_would_be_ignored(settings: dict[str, Any], ignored: list[str]):
    config = resolve(TrainConfig(**settings))
    assert [name for name in settings if is_ignored(config, name)] == ignored
    if ignored:
        with pytest.raises(HessianFlowError, match=f"^--{ignored[0].replace('_', '-')} "):
            check_effects(config, settings)
    else:
        check_effects(config, settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"schedule": "cosine", "milestones": (3,)},
            (
                "--milestones is a setting of --schedule multistep or of --controller"
                " grow-instead-of-decay: leave it out"
            ),
        ),
        (
            {"data_dir": "x"},
            (
                "--data-dir does nothing with --data digits: name the data set that is there with"
                " --data"
            ),
        ),
        (
            {"controller": "abs", "adversary": "pgd"},
            "--adversary does nothing with --controller abs: leave it out",
        ),
        (
            {"adversarial_share": 0.0},
            "--adversary does nothing with --adversarial-share 0.0: leave it out",
        ),
        (
            {"elastic": True, "checkpoint_minutes": 1.0},
            "--checkpoint-minutes does nothing with --elastic: leave it out",
        ),
        (
            {"max_rollbacks": 2},
            "--max-rollbacks is a setting of --on-divergence rollback: leave it out",
        ),
    ],
)
def test_the_refusal_names_what_the_option_belongs_to(settings: dict[str, Any], words: str):
    with pytest.raises(HessianFlowError) as refused:
        check_effects(resolve(TrainConfig(**settings)), ["adversary", *settings])
    assert str(refused.value) == words


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"staleness": 1}, "--staleness is a setting of --adversary conadv: leave it out"),
        ({"server": "ray"}, "--server is a setting of --controller dual-batch: leave it out"),
        (
            {"ray_address": "auto"},
            "--ray-address is a setting of --elastic runs or of --controller dual-batch",
        ),
        ({"max_workers": 3}, "--max-workers is a setting of --elastic runs: add --elastic"),
        (
            {"dropouts": (0.1, 0.2)},
            "--dropouts needs --resolution cyclic, once or uniform: leave it out",
        ),
        (
            {"controller": "dual-batch", "checkpoint_minutes": 1},
            "--checkpoint-minutes does nothing with --controller",
        ),
    ],
)
def test_what_resolving_never_fills_is_refused_from_python_too(
    settings: dict[str, Any], words: str
):
    with pytest.raises(HessianFlowError) as refused:
        TrainConfig(**settings)
    assert words in str(refused.value)
