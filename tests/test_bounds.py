"""Types and bounds of settings, wherever they come from."""

import math
from typing import Any, get_args

import pytest

from hessianflow.bounds import Range, user_path
from hessianflow.config import TrainConfig, from_dict, hints
from hessianflow.interfaces import HessianFlowError
from hessianflow.methods import Choice
from hessianflow.resolve import resolve


def refusal(**settings: Any) -> str:
    with pytest.raises(HessianFlowError) as refused:
        resolve(TrainConfig(**settings))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": None}, "--seed must be a whole number, got None"),
        ({"seed": 1.5}, "--seed must be a whole number, got 1.5"),
        ({"seed": True}, "--seed must be a whole number, got True"),
        ({"seed": 10**400}, "--seed must be at most 4.29497e+09, got a number of about 400 digits"),
        ({"epochs": -(10**400)}, "--epochs must be at least 1, got a number of about 400 digits"),
        ({"batch_size": 999_999_999_999}, "--batch-size must be at most 1e+09, got 999999999999"),
        ({"lr": 1e308}, "--lr must be at most 1e+30, got 1e+308"),
        (
            {"optimizer": {"name": "sgd", "weight_decay": math.inf}},
            "--optimizer.weight-decay must be at most 1e+30, got inf",
        ),
        ({"lr": math.nan}, "--lr must be a number from 0 to 1e+30, got nan"),
        ({"lr": "0.1"}, "--lr must be a number, got '0.1'"),
        ({"lr": [0.1]}, "--lr must be a number, got [0.1]"),
        (
            {"keep_checkpoints": 1_000_000_000},
            "--keep-checkpoints must be at most 1000, got 1000000000",
        ),
        (
            {"controller": {"name": "absa", "growth_factor": 1}},
            "--controller absa: growth_factor must be a finite number > 1, got 1",
        ),
        (
            {"controller": {"name": "absa", "decay_factor": math.nan}},
            "--controller.decay-factor must be a number from -1e+30 to 1e+30, got nan",
        ),
        ({"controller": None}, "--controller must be one of absa, abs,"),
        ({"controller": "ABSA"}, "unknown controller 'ABSA' (did you mean absa?)"),
        (
            {"log_level": "x"},
            "--log-level must be one of 'debug', 'info', 'warning', 'error', got 'x'",
        ),
        ({"plots": "yes"}, "--plots must be true or false, got 'yes'"),
        ({"plots": 1}, "--plots must be true or false, got 1"),
        ({"model": 5}, "--model must be text, got 5"),
        ({"model": ""}, "--model must not be empty"),
        ({"run_dir": "a\0b"}, r"--run-dir must not hold the character '\x00'"),
        ({"run_dir": "a\nb"}, r"--run-dir must not hold the character '\n'"),
        ({"run_dir": "a\u2028b"}, r"--run-dir must not hold the character '\u2028'"),
        ({"run_dir": "a\udcffb"}, r"--run-dir must not hold the character '\udcff'"),
        ({"data_dir": "x" * 5000}, "--data-dir must be at most 4096 characters long, got 5000"),
        (
            {"schedule": {"name": "multistep", "milestones": "abc"}},
            "--schedule.milestones must be a list like [30, 60], got 'abc'",
        ),
        (
            {"schedule": {"name": "multistep", "milestones": (1, 2.5)}},
            "--schedule.milestones must be a list like [30, 60], got (1, 2.5)",
        ),
        (
            {"schedule": {"name": "multistep", "milestones": (10**400,)}},
            "--schedule.milestones must be at most 1e+09, got a number of about 400 digits",
        ),
        (
            {"controller": {"name": "timed", "stages": ((1, 2, 3),)}},
            "--controller.stages must be a list like [[2, 256], [4, 512]]",
        ),
        (
            {"controller": {"name": "timed", "stages": (1, 2)}},
            "--controller.stages must be a list like [[2, 256], [4, 512]], got (1, 2)",
        ),
        (
            {"microbatch_size": "big"},
            "--microbatch-size must be a whole number or 'auto', got 'big'",
        ),
        (
            {"resolution": "once", "resolution_batch_sizes": ()},
            "--resolution-batch-sizes must be 1 or more, got []",
        ),
        (
            {"adversary": {"name": "fgsm", "eps": None}},
            "--adversary.eps must be a number or a list like [0.1, 0.2], got None",
        ),
        (
            {"adversary": {"name": "conadv", "attack": {"name": "pgd", "eps": math.nan}}},
            "--adversary.attack.eps must be a number from -1e+30 to 1e+30, got nan",
        ),
        ({"device": ["cpu"]}, "--device must be text, got ['cpu']"),
        ({"model": "x" * 100_000}, "--model must be at most 4096 characters long"),
        ({"lr": "x" * 100_000}, "--lr must be a number, got 'xxxx"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_one_line_names_option_bound_and_value(settings: dict[str, Any], words: str):
    message = refusal(**settings)
    assert words in message
    assert len(message) < 400


def kinds(hint: Any) -> set[Any]:
    return {hint} | {kind for part in get_args(hint) for kind in kinds(part)}


def test_every_number_has_bounds():
    """So that none of them meets an overflow further down."""
    found = {name: kinds(hint) for name, hint in hints().items()}
    numeric = {name for name, parts in found.items() if parts & {int, float}}
    bounded = {name for name in numeric if any(isinstance(p, Range) for p in found[name])}
    assert len(bounded) > 15
    assert numeric - bounded == {"dropouts"}, "which have a check of their own"


def test_whole_numbers_are_numbers_and_lists_are_lists():
    config = TrainConfig(
        lr=1,
        schedule={"name": "multistep", "milestones": [1, 2]},  # type: ignore[arg-type]
        controller={"name": "dual-batch", "slope": 1, "intercept": 2.0},  # type: ignore[arg-type]
    )
    assert config.lr == 1
    assert config.schedule == Choice("multistep", {"milestones": (1, 2)})


def test_a_recorded_setting_of_another_type_is_refused_like_one_that_is_typed():
    with pytest.raises(
        HessianFlowError, match=r"--keep-checkpoints must be a whole number, got 1\.5"
    ):
        from_dict({"keep_checkpoints": 1.5}, "here")


def test_paths_begin_at_home_with_a_tilde(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = resolve(TrainConfig(data="cifar10", data_dir="~/data", run_dir="~"))
    assert (config.data_dir, config.run_dir) == ("/home/somebody/data", "/home/somebody")
    assert resolve(TrainConfig(run_dir="./a//~b/")).run_dir == "./a//~b/", "nothing else is touched"
    with pytest.raises(
        HessianFlowError,
        match="--run-dir ~nobody-here/x: no home folder is known; write the path out",
    ):
        resolve(TrainConfig(run_dir="~nobody-here/x"))
    assert user_path(None, "--out") is None
