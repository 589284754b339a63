"""The table of what has an effect where: complete, of choices that exist, and right for pairs
worked out by hand. Options of methods are not in it: a method refuses those that it does not have.
"""

from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest

from hessianflow.commands.settings import Given
from hessianflow.config import CHOSEN, TrainConfig
from hessianflow.data.datasets import DATA_SETS
from hessianflow.effects import EFFECTIVE, AllBut, check_effects, is_ignored
from hessianflow.interfaces import HessianFlowError
from hessianflow.methods import KINDS, method_options
from hessianflow.resolve import resolve

ALWAYS = {
    *(
        "data",
        "train_examples",
        "test_examples",
        "model",
        "controller",
        "adversary",
        "optimizer",
        "batch_size",
    ),
    *(
        "max_batch_size",
        "epochs",
        "lr",
        "schedule",
        "warmup_epochs",
        "microbatch_size",
    ),
    *(
        "norm_batch_size",
        "augment",
        "precision",
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
        for dotted, values in (item for case in cases for item in case.items()):
            named = values.names if isinstance(values, AllBut) else values
            name, _, option = dotted.partition(".")
            for value in named:
                if option:
                    assert value in words(method_options(KINDS[name], "dual-batch")[option].hint)
                elif name in CHOSEN:
                    assert value in KINDS[name].methods
                elif name == "data":
                    assert value in DATA_SETS
                else:
                    assert value in words(hints[name]) or (
                        hints[name] is bool and value in (True, False)
                    ), (name, value)


@pytest.mark.parametrize(
    ("settings", "ignored"),
    [
        ({"max_lr_factor": 3.0, "lr_rule": "sqrt"}, []),
        ({"split_norm": True, "adversary": "conadv"}, []),
        ({"controller": {"name": "dual-batch", "server": "ray"}, "ray_address": "auto"}, []),
        ({"controller": "dual-batch", "norm_statistics": "running"}, ["norm_statistics"]),
        ({"resolution": "once", "resolution_batch_sizes": (8, 4)}, []),
        ({"controller": "fixed", "curvature": "off", "norm_mode": "batch"}, ["norm_mode"]),
        ({"data_dir": "/somewhere"}, ["data_dir"]),
        ({"data": "text", "data_dir": "/somewhere", "block_length": 64}, []),
        ({"data": "python", "augment": False}, []),
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
            {"data_dir": "x"},
            (
                "--data-dir does nothing with --data digits: name the data set that is there with"
                " --data"
            ),
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
        check_effects(resolve(TrainConfig(**settings)), settings)
    assert str(refused.value) == words


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"schedule": {"name": "cosine", "milestones": (3,)}},
            "--schedule.milestones is an option of multistep, not of cosine: leave it out, or use"
            " --schedule multistep",
        ),
        (
            {"adversary": {"name": "fgsm", "staleness": 1}},
            "--adversary.staleness is an option of conadv, not of fgsm: leave it out, or use"
            " --adversary conadv",
        ),
        (
            {"controller": {"name": "absa", "server": "ray"}},
            "--controller.server is an option of dual-batch, not of absa",
        ),
        (
            {"controller": {"name": "adabatch", "patience": 3}},
            "--controller.patience is an option of absa and abs, not of adabatch",
        ),
        (
            {"optimizer": {"name": "adam", "momentum": 0.5}},
            "--optimizer.momentum is an option of sgd and lars and clars and muon, not of adam",
        ),
        (
            {"optimizer": {"name": "sgd", "trust_coefficient": 0.1}},
            "--optimizer.trust-coefficient is an option of lars and clars, not of sgd",
        ),
        (
            {"controller": "abs", "adversary": "pgd"},
            "--controller abs: it trains on clean examples, leave --adversary pgd out or use absa",
        ),
        (
            {"dropouts": (0.1, 0.2)},
            "--dropouts needs --resolution cyclic, once or uniform: leave it out",
        ),
    ],
)
def test_what_a_run_cannot_use_is_refused_from_python_too(settings: dict[str, Any], words: str):
    with pytest.raises(HessianFlowError) as refused:
        resolve(TrainConfig(**settings))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_adversary_that_attacks_nothing_is_refused_where_it_is_typed():
    """From a file or from Python it passes: it asks for what holds anyway."""
    config = resolve(TrainConfig(adversary={"name": "pgd", "share": 0}))  # type: ignore[arg-type]
    Given(frozenset(), frozenset({"adversary"})).check(config)
    with pytest.raises(
        HessianFlowError, match=r"--adversary pgd does nothing with --adversary\.share 0"
    ):
        Given(frozenset({"adversary", "adversary.share"}), frozenset()).check(config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"ray_address": "auto", "controller": "dual-batch"},
            "--ray-address needs --controller.server ray: leave it out",
        ),
        ({"ray_address": "auto"}, "--ray-address is a setting of --elastic runs or of"),
        ({"max_workers": 3}, "--max-workers is a setting of --elastic runs: add --elastic"),
        ({"split_norm": True}, "--split-norm needs --adversary conadv"),
        (
            {"controller": "dual-batch", "checkpoint_minutes": 1},
            "--checkpoint-minutes does nothing with --controller dual-batch",
        ),
        (
            {"controller": "dual-batch", "on_divergence": "rollback"},
            "--on-divergence does nothing with --controller dual-batch",
        ),
    ],
)
def test_what_resolving_never_fills_is_refused_from_python_too(
    settings: dict[str, Any], words: str
):
    with pytest.raises(HessianFlowError) as refused:
        TrainConfig(**settings)
    assert words in str(refused.value)
