"""The contract of every method in the tables: it can be had, each of its options can be given, a
bad value is one line, what it keeps it goes on with, and what is written of it loads again."""

import copy
import inspect
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hessianflow.choices import build_observers, parameters_for
from hessianflow.commands.settings import commented
from hessianflow.commands.yaml_text import load_value, read_settings
from hessianflow.config import CHOSEN, RunConfig, TrainConfig, from_dict, to_dict
from hessianflow.control import FixedBatch
from hessianflow.data import DeviceBatches
from hessianflow.interfaces import CurvatureReading, HessianFlowError, Progress
from hessianflow.methods import KINDS, Choice, find, make, method_options
from hessianflow.options import Option, parameters_of
from hessianflow.resolve import resolve

METHODS = [(kind.name, name) for kind in KINDS.values() for name in kind.methods]
NEEDED: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("optimizer", "extrapolation"): {"lookahead_lr": 0.1},
}
"""Options that a run can have no default for."""
RATES = {"optimizer": {"lr": 0.01}}
"""Settings that a run with such a method needs."""


def method(kind: str, name: str) -> Any:
    return find(KINDS[kind], name, kind)


def options(kind: str, name: str) -> dict[str, Option]:
    return method_options(KINDS[kind], name)


def settings(kind: str, name: str, **given: Any) -> dict[str, Any]:
    """Settings of a run with this method, wherever in them it stands."""
    chosen = {"name": name, **NEEDED.get((kind, name), {}), **given}
    if kind in ("attack", "runner"):
        return {"adversary": {"name": "conadv", kind: chosen}}
    return {kind: chosen, **RATES.get(kind, {})}


def resolved(kind: str, name: str, **given: Any) -> RunConfig:
    return resolve(TrainConfig(**settings(kind, name, **given)))


def chosen(kind: str, name: str, **given: Any) -> Choice:
    """The method with a value for each of its options."""
    config = resolved(kind, name, **given)
    if kind in ("attack", "runner"):
        found: Choice = config.adversary.options[kind]
        return found
    whole: Choice = getattr(config, kind)
    return whole


def made(kind: str, name: str, batches: DeviceBatches | None = None, **given: Any) -> Any:
    """An object of the method for a run of digits; attacks and adversaries on pixels."""
    config = resolved(kind, name, **given)
    supplied: dict[str, Any] = {
        "batch_size": config.batch_size,
        "max_batch_size": config.max_batch_size,
        "epochs": config.epochs,
        "value_range": (0.0, 1.0),
        "seed": 0,
        "lr": 0.01,
        "batches": batches or data(),
    }
    model = network()
    supplied |= {"params": list(model.parameters()), "model": model}
    if kind == "optimizer":
        supplied["params"] = parameters_for(chosen(kind, name), model)
    return make(KINDS[kind], chosen(kind, name, **given), **supplied)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


def data() -> DeviceBatches:
    source = torch.Generator().manual_seed(1)
    images = torch.rand(16, 3, 2, 2, generator=source)
    return DeviceBatches(images, torch.arange(16) % 3, 8, shuffle=False)


every_method = pytest.mark.parametrize(("kind", "name"), METHODS, ids=map("-".join, METHODS))


# What can be given.

SUPPLIED_WITHOUT_OPTION: Mapping[str, str] = {
    "params": "the weights of the model",
    "lr": "--lr",
    "model": "--model",
    "norms": "the trainer's own, taken from microbatches",
    "batch_size": "--batch-size",
    "max_batch_size": "--max-batch-size",
    "lr_rule": "--lr-rule",
    "max_lr_factor": "--max-lr-factor",
    "value_range": "the range of the pixels, which the data know",
    "seed": "--seed",
    "loss_fn": "the loss that is trained on",
    "batches": "the training data",
    "epochs": "--epochs",
    "optimizer": "--optimizer",
    "last_epoch": "where the run stands",
    "share": "--adversary.share, of the adversary whose twins the attack makes",
}
"""Parameters of constructors that are no options of the method: what supplies them."""


def test_every_keyword_option_of_every_method_is_reachable() -> None:
    """Parameters less those that the run supplies are the options; none is left over."""
    parameters = reachable = 0
    for kind, name in METHODS:
        taken = parameters_of(method(kind, name))
        parameters += len(taken)
        known = options(kind, name)
        reachable += len(known)
        for parameter in taken.keys() - known.keys():
            assert parameter in KINDS[kind].supplied, f"{name} {parameter} cannot be given"
            assert parameter in SUPPLIED_WITHOUT_OPTION
    assert parameters > reachable > 110
    assert {name for kind in KINDS.values() for name in kind.supplied} == (
        SUPPLIED_WITHOUT_OPTION.keys()
    )


def is_plain(hint: Any) -> bool:
    if hint in (int, float, bool, str, type(None)):
        return True
    if get_origin(hint) is not None and isinstance(get_args(hint)[0], str):
        return True  # words that are listed
    parts = [part for part in get_args(hint) if part is not Ellipsis]
    return bool(parts) and all(map(is_plain, parts))


@every_method
def test_every_option_says_what_it_means_and_is_of_a_plain_type(kind: str, name: str) -> None:
    assert inspect.getdoc(method(kind, name))
    for option in options(kind, name).values():
        assert option.help.strip(), f"{name}.{option.name} has no help text"
        assert is_plain(option.hint), f"{name}.{option.name}: {option.hint}"


@every_method
def test_a_default_is_a_value_that_may_be_given(kind: str, name: str) -> None:
    """And every option that a run has a value for, given with it, changes nothing."""
    whole = chosen(kind, name)
    assert whole.options.keys() == options(kind, name).keys()
    plain = {key: value for key, value in whole.to_dict().items() if key != "name"}
    if name in ("sgd", "adam", "adamw"):  # torch refuses two of them together
        plain = {key: value for key, value in plain.items() if key not in ("foreach", "fused")}
    assert chosen(kind, name, **plain).options == whole.options


# Bad values.

FREE: Mapping[tuple[str, str], str] = {
    ("dampening", "-1e30"): "torch's SGD takes any number",
    ("loss_floor", "-1e30"): "a loss may lie anywhere",
}
"""Numbers that are let through: what says so."""


def numbers(hint: Any) -> set[Any]:
    return {hint} & {int, float} | {part for inner in get_args(hint) for part in numbers(inner)}


def bad_values(option: Option) -> Iterator[Any]:
    """nan, and a number far below any use, in the shape of the option."""
    kinds = numbers(option.hint)
    whole = kinds == {int}
    for number in (math.nan, -(10**30) if whole else -1e30):
        parts = get_args(option.hint)
        if get_origin(option.hint) is tuple and get_origin(parts[0]) is tuple:
            yield ((number, number),)
        elif get_origin(option.hint) is tuple:
            yield (number,) if Ellipsis in parts else (number,) * len(parts)
        elif "Mapping" in str(option.hint):
            yield {32: number}
        else:
            yield number


@every_method
def test_a_bad_number_is_one_line_that_names_the_option(kind: str, name: str) -> None:
    for option in options(kind, name).values():
        if not numbers(option.hint):
            continue
        for value in bad_values(option):
            spelled = "nan" if "nan" in str(value) else "-1e30"
            if (option.name, spelled) in FREE:
                made(kind, name, **{option.name: value})
                continue
            with pytest.raises(HessianFlowError) as refused:
                made(kind, name, **{option.name: value})
            message = str(refused.value)
            assert "\n" not in message
            assert len(message) < 300
            words = message.replace("-", "_").lower()
            assert option.name in words or option.name.removesuffix("s") in words, message


@every_method
def test_an_option_that_it_does_not_have_is_one_line(kind: str, name: str) -> None:
    with pytest.raises(HessianFlowError, match=r"no_such|no-such") as refused:
        resolved(kind, name, no_such_option=3)
    assert "\n" not in str(refused.value)


# What is written down.


def flat(settings_of_run: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are read from YAML text, by dotted names, nested again."""
    found: dict[str, Any] = {}
    for dotted, value in settings_of_run.items():
        *outer, last = dotted.split(".")
        place = found
        for part in outer:
            if not isinstance(place.get(part), dict):
                place[part] = {"name": place[part]}
            place = place[part]
        place[last] = value
    return found


def from_yaml(text: str, folder: Path) -> RunConfig:
    (folder / "settings.yaml").write_text(text)
    words = read_settings(str(folder / "settings.yaml"))
    values = {name: load_value(word) for name, word in words.items()}
    return resolve(from_dict(flat(values), "settings.yaml"))


@every_method
def test_commented_settings_load_again_to_the_same_run(
    kind: str, name: str, tmp_path: Path
) -> None:
    config = resolved(kind, name)
    text = commented(config)
    assert from_yaml(text, tmp_path) == config
    for option in options(kind, name).values():
        words = option.help.split()[:3]
        assert " ".join(words) in " ".join(text.replace("#", " ").split())


@every_method
def test_settings_survive_config_json(kind: str, name: str) -> None:
    config = resolved(kind, name)
    assert resolve(from_dict(json.loads(json.dumps(to_dict(config))), "config.json")) == config


def test_an_option_that_is_a_mapping_survives_too(tmp_path: Path) -> None:
    config = resolved("controller", "noise-scale", seconds_per_batch={32: 0.1, 64: 0.15})
    assert config.controller.options["seconds_per_batch"] == {32: 0.1, 64: 0.15}
    assert from_yaml(commented(config), tmp_path) == config
    assert resolve(from_dict(json.loads(json.dumps(to_dict(config))), "config.json")) == config


# What a method keeps.

CONTROLLERS = [name for name in KINDS["controller"].methods if name != "dual-batch"]
"""Those that decide while a run goes on; a dual-batch plan is made before it."""


def scripted(controller: Any, epochs: range) -> list[Any]:
    """Decisions over epochs of 45 updates, with everything that a controller may look at."""
    found = []
    for epoch in epochs:
        for update in (15, 30, 45):
            examples = (epoch - 1) * 1440 + update * 32
            done = Progress(epoch - (update < 45), examples, examples // 32, 1440, 30)
            if not controller.is_due(done):
                continue
            top = 10.0 * 0.6 ** (epoch + update / 45)
            reading = CurvatureReading(top, top / 100, True, 12, "batch")
            signals = {
                "epoch_loss": 2.0 * 0.7**epoch,
                "loss": 2.0 * 0.7**epoch,
                "learning_rate": 0.05,
                "gradient_variance": 4.0,
                "gradient_sq_norm": 0.05 * 0.8**epoch,
                "gradient_sum_sq": 90.0,
                "gradient_sq_sum": 30.0,
            }
            wanted = {name: signals.get(name, 1.0) for name in controller.needs}
            found.append(controller.update(done, reading, wanted))
    return found


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_controller_stays_within_one_and_the_cap(name: str) -> None:
    config = resolved("controller", name)
    decisions = scripted(made("controller", name), range(1, 31))
    sizes = [decision.batch_size for decision in decisions]
    assert all(1 <= size <= config.max_batch_size for size in sizes)
    assert all(math.isfinite(d.lr_factor) and d.lr_factor >= 0 for d in decisions)
    assert all(0 <= d.attack_factor <= 1 for d in decisions)
    if name in ("absa", "abs", "critical", "timed", "adabatch", "grow-instead-of-decay"):
        assert sizes == sorted(sizes)
        assert sizes[-1] > config.batch_size


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_controller_goes_on_where_it_was(name: str) -> None:
    whole = made("controller", name)
    scripted(whole, range(1, 8))
    again = made("controller", name)
    again.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert again.decision == whole.decision
    assert scripted(again, range(8, 20)) == scripted(whole, range(8, 20))


@pytest.mark.parametrize("name", KINDS["adversary"].methods)
def test_an_adversary_goes_on_where_it_was(name: str) -> None:
    """Its next examples are those of the one that went on, not those of a new one."""
    given: dict[str, Any] = {"share": 0.5, "eps": 0.2}
    if "random_start" in options("adversary", name):
        given["random_start"] = True
    if name == "conadv":
        attack = {"name": "fgsm", "eps": 0.2, "random_start": True}
        given = {"share": 0.5, "attack": attack, "staleness": 0}
    model = network()
    batches = [data() for _ in range(3)]
    whole, again, fresh = (made("adversary", name, batches=b, **given) for b in batches)
    attacked(whole, model, batches[0])
    again.load_state_dict(copy.deepcopy(whole.state_dict()))
    expected = attacked(whole, model, batches[0])
    assert all(map(torch.equal, expected, attacked(again, model, batches[1])))
    assert not all(map(torch.equal, expected, attacked(fresh, model, batches[2])))


def attacked(adversary: Any, model: nn.Module, batches: DeviceBatches) -> list[torch.Tensor]:
    """What it makes of every batch, each then trained on as far as its gradient."""
    found = []
    for inputs, targets in batches:
        made_of_it = adversary.attack(model, inputs, targets, 0.5)()
        exposure = adversary.expose(model, inputs, targets, made_of_it, 0.5)
        if exposure.on_input_gradient is not None:
            seen = made_of_it.clone().requires_grad_()
            cross_entropy(model(seen), targets).backward()
            exposure.on_input_gradient(seen.grad)
        found.append(made_of_it)
    return found


def step(optimizer: Any, model: nn.Module, count: int) -> None:
    inputs, targets = data().sample(16)

    watching = build_observers(FixedBatch(16), optimizer)
    for observer in watching:
        observer.bind(list(model.parameters()))  # type: ignore[attr-defined]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for observer in watching:
            observer.on_microbatch(gradients, 16)
            observer.on_step(gradients, 16)
        return loss

    for _ in range(count):
        closure()
        optimizer.step(closure)


@pytest.mark.parametrize("name", KINDS["optimizer"].methods)
def test_an_optimizer_goes_on_where_it_was(name: str) -> None:
    def pair() -> tuple[nn.Module, Any]:
        model = network()
        whole = chosen("optimizer", name)
        supplied = {"params": parameters_for(whole, model), "model": model, "lr": 0.05}
        return model, make(KINDS["optimizer"], whole, **supplied)

    model, whole = pair()
    step(whole, model, 3)
    other, again = pair()
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(whole.state_dict()))
    step(whole, model, 2)
    step(again, other, 2)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    start = network()
    assert not all(map(torch.equal, model.parameters(), start.parameters()))


@pytest.mark.parametrize("name", KINDS["schedule"].methods)
def test_a_schedule_starts_at_one_and_never_rises(name: str) -> None:
    shape = made("schedule", name)
    factors = [shape(epoch / 4) for epoch in range(120)]
    assert factors[0] == 1
    assert all(1 >= before >= after >= 0 for before, after in itertools.pairwise(factors))


def test_a_method_of_ones_own_is_named_by_its_path() -> None:
    for kind in CHOSEN:
        name, method = next(iter(KINDS[kind].methods.items()))
        path = f"{method.__module__}:{method.__name__}"
        own = {"name": path}
        config = resolve(TrainConfig(**{kind: own, **RATES.get(kind, {})}))
        assert getattr(config, kind).name == path
        assert getattr(config, kind).options.keys() == options(kind, name).keys()
