"""Settings: what is filled in, what survives being written down, and that a default is stated
once."""

import inspect
import json
from typing import Any

import pytest

from hessianflow.config import RunConfig, TrainConfig, from_dict, to_dict
from hessianflow.control import AdaBatch, CriticalBatch
from hessianflow.interfaces import HessianFlowError
from hessianflow.methods import Choice
from hessianflow.resolve import resolve


def options(config: TrainConfig) -> dict[str, Any]:
    return dict(config.controller.options)


def timed(**given: Any) -> dict[str, Any]:
    return {"name": "timed", **given}


def test_text_has_methods_of_its_own_unless_others_are_given() -> None:
    usual = resolve(TrainConfig(data="python"))
    assert (usual.optimizer.name, usual.lr, usual.lr_rule) == ("adamw", 0.004, "sqrt")
    assert (usual.adversary.name, usual.schedule.name) == ("none", "cosine")
    assert (usual.model, usual.block_length) == ("gpt-tiny", 128)
    other = resolve(TrainConfig(data="python", optimizer="sgd", schedule="constant"))
    assert (other.optimizer.name, other.schedule.name) == ("sgd", "constant")
    assert resolve(TrainConfig()).optimizer.name == "sgd"
    assert resolve(TrainConfig()).block_length is None


def test_timed_stages_are_planned_for_the_epochs_and_the_cap() -> None:
    """A twelfth, a sixth and a third of 24 epochs are 2, 4 and 8; of 30: 2.5, 5 and 10, the first
    rounded up."""
    planned = resolve(
        TrainConfig(
            data="cifar10", controller="timed", epochs=24, batch_size=128, max_batch_size=2048
        )
    )
    assert options(planned) == {"stages": ((2, 256), (4, 512), (8, 1024)), "decay_from": 8}
    assert planned.schedule == Choice("constant")
    capped = resolve(
        TrainConfig(controller=timed(decay_from=20), epochs=30, batch_size=32, max_batch_size=100)
    )
    assert options(capped) == {"stages": ((3, 64), (5, 100), (10, 100)), "decay_from": 20}
    by_hand = resolve(TrainConfig(controller=timed(stages=((3, 64),))))
    assert options(by_hand) == {"stages": ((3, 64),), "decay_from": None}
    assert "stages" not in options(resolve(TrainConfig(controller="critical")))


def test_readings_of_real_images_have_a_budget_where_none_is_given() -> None:
    def budget(**given: Any) -> float | None:
        return resolve(TrainConfig(**given)).curvature_budget

    assert budget(data="cifar10") == 0.01
    assert budget(data="cifar10", curvature_budget=100.0) == 100
    assert budget(data="digits") is budget(data="fake") is None
    assert budget(data="cifar10", controller="dual-batch") is None


def test_settings_survive_being_written_down() -> None:
    config = resolve(TrainConfig(controller="timed"))
    written = json.loads(json.dumps(to_dict(config)))
    assert resolve(from_dict(written, "here")) == config


def test_defaults_are_those_of_the_controllers() -> None:
    found = options(resolve(TrainConfig(controller="critical")))
    critical = inspect.signature(CriticalBatch).parameters
    for name in ("edge_share", "loss_power", "excess_power"):
        assert found[name] == critical[name].default
    others = options(resolve(TrainConfig(controller="critical", optimizer="adamw")))
    assert others["edge_share"] is None, "the stable rate is that of SGD"
    adabatch = options(resolve(TrainConfig(controller="adabatch")))
    assert (
        adabatch["every_epochs"] == inspect.signature(AdaBatch).parameters["every_epochs"].default
    )


def test_a_run_is_resolved_once() -> None:
    """What resolve made is what it makes of that again; what is left open stays so until then."""
    given = TrainConfig(controller={"name": "absa", "patience": 3})
    assert given.controller == Choice("absa", {"patience": 3})
    assert (given.schedule, given.adversary, given.lr) == (None, None, None)
    resolved = resolve(given)
    assert isinstance(resolved, RunConfig)
    assert resolve(resolved) is resolved
    assert resolve(TrainConfig(**{n: getattr(resolved, n) for n in vars(given)})) == resolved
    assert resolved.controller.options["patience"] == 3
    assert resolved.adversary.name == "fgsm"


def test_what_a_controller_prefers_gives_way_to_what_is_given() -> None:
    critical = resolve(TrainConfig(controller="critical"))
    assert (critical.schedule.name, critical.norm_mode) == ("cooldown", "batch")
    assert resolve(TrainConfig(controller="abs")).adversary == Choice("none")
    own = resolve(TrainConfig(controller="critical", schedule="cosine", adversary="pgd"))
    assert (own.schedule.name, own.adversary.name) == ("cosine", "pgd")
    no_edge = {"name": "critical", "edge_share": None}
    assert resolve(TrainConfig(controller=no_edge, norm_mode="eval")).norm_mode == "eval"


def test_milestones_and_patience_are_those_of_the_data_set() -> None:
    """Digits: 20 and 26 of 30 epochs, patience 5; a run of half the length has them at half."""
    config = resolve(TrainConfig(epochs=15))
    assert config.schedule.options["milestones"] == (10, 13)
    assert config.controller.options["patience"] == 5
    assert resolve(TrainConfig(data="cifar10")).controller.options["patience"] == 10
    growing = resolve(TrainConfig(controller="grow-instead-of-decay", epochs=15))
    assert growing.controller.options["milestones"] == (10, 13)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"controller": {"patience": 3}}, "--controller needs a name, as in {name: absa}"),
        (
            {"controller": {"name": "absa", "patients": 3}},
            "unknown option --controller.patients (did you mean --controller.patience?); absa has",
        ),
        (
            {"controller": {"name": "fixed", "patience": 3}},
            "--controller.patience is an option of absa and abs, not of fixed: leave it out, or use"
            " --controller absa",
        ),
        (
            {"adversary": {"name": "conadv", "attack": {"name": "fgsm", "steps": 3}}},
            "--adversary.attack.steps is an option of pgd, not of fgsm",
        ),
        (
            {"optimizer": {"name": "sam", "base": "sgdd"}},
            "--optimizer.base: unknown optimizer 'sgdd' (did you mean sgd?)",
        ),
        ({"controller": "nowhere:Mine"}, "nowhere"),
        ({"optimizer": "torch.optim:NoSuch"}, "NoSuch"),
        ({"optimizer": "extrapolation"}, "needs --optimizer.lookahead-lr"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_option_of_another_method_is_refused_with_its_home(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(HessianFlowError) as refused:
        resolve(TrainConfig(**settings))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
