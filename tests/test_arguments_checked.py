"""Every choice and every number that a public constructor takes is checked where it is given, in
one line.

The arguments are found by their annotations, so that one which is added is tried, too.
"""

import inspect
import math
import types
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import nn

from hessianflow import adversarial, control, optim
from hessianflow.adversarial import FGSM
from hessianflow.control import FixedBatch, Level
from hessianflow.interfaces import HessianFlowError

MODEL = nn.Linear(2, 2)
RESULTS = {
    *(
        "Decision",
        "DualBatchPlan",
        "Published",
        "Replay",
        "ReplayStep",
    ),
    *("RobustAccuracy", "Stage", "TimeModel", "Worker", "WorkerPlan"),
}
"""Made by the toolkit, not by its users."""
NEEDED: dict[str, Callable[[], Any]] = {
    "attack": lambda: FGSM(0.1, value_range=None),
    "base": lambda: torch.optim.SGD(MODEL.parameters(), lr=0.1),
    "base_batch_size": lambda: 16,
    "base_lr": lambda: 0.1,
    "batch_size": lambda: 16,
    "controller": lambda: FixedBatch(16),
    "decay_from": lambda: 2,
    "draw": lambda: lambda: [],
    "eps": lambda: 0.1,
    "extra_time_ratio": lambda: 1.05,
    "intercept": lambda: 0.1,
    "large_batch_size": lambda: 16,
    "levels": lambda: [Level(16, 8)],
    "lookahead_lr": lambda: 0.1,
    "loss_fn": lambda: nn.functional.cross_entropy,
    "lr": lambda: 0.1,
    "max_batch_size": lambda: 64,
    "milestones": lambda: (2,),
    "model": lambda: MODEL,
    "momentum": lambda: 0.9,
    "num_examples": lambda: 100,
    "num_small": lambda: 2,
    "num_workers": lambda: 4,
    "params": lambda: [MODEL.weight],
    "phase_ends": lambda: [4],
    "power": lambda: 2.0,
    "reference_batch_size": lambda: 16,
    "resolution": lambda: 16,
    "rule": lambda: "sqrt",
    "schedule": lambda: "cyclic",
    "slope": lambda: 0.1,
    "stages": lambda: [(1, 16)],
    "total_steps": lambda: 10,
    "update_factor": lambda: 0.5,
    "value_range": lambda: None,
    "warmup_steps": lambda: 2,
}
"""Values for what cannot be left out."""


def built(make: Any, **given: Any) -> Any:
    arguments = {
        name: NEEDED[name]()
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.default is parameter.empty and name not in given
    }
    return make(**arguments, **given)


def kinds(annotation: Any) -> set[Any]:
    """Literal, int and float, as far as an argument may be one of them."""
    if get_origin(annotation) is Literal:
        return {Literal}
    parts = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return {Literal if get_origin(part) is Literal else part for part in parts}


def of_tables(room: Any) -> dict[str, Any]:
    """Return the classes that stand in a table of a room, whether they are public or not."""
    tables = [table for table in vars(room).values() if isinstance(table, dict)]
    classes = [each for table in tables for each in table.values() if inspect.isclass(each)]
    own = [each for each in classes if each.__module__.startswith("hessianflow.")]
    return {each.__name__: each for each in own}


def cases() -> list[Any]:
    found = []
    for room in (control, optim, adversarial):
        public = {name: getattr(room, name) for name in room.__all__}
        for name, make in {**public, **of_tables(room)}.items():
            if name in RESULTS or not callable(make) or getattr(make, "_is_protocol", False):
                continue
            parameters = inspect.signature(make).parameters
            if any(p.default is p.empty and key not in NEEDED for key, p in parameters.items()):
                continue  # such as a function of a batch
            hints = get_type_hints(make.__init__ if inspect.isclass(make) else make)
            wanted = [key for key in parameters if kinds(hints.get(key)) & {Literal, int, float}]
            found += [pytest.param(make, key, id=f"{name}-{key}") for key in wanted]
    return found


CASES = cases()


@pytest.mark.parametrize(("make", "argument"), CASES)
def test_a_wrong_argument_is_refused_in_one_line(make: Any, argument: str):
    built(make)  # else the refusals below would be of something else
    for wrong in ("no such choice", math.nan, ["a list"]):
        with pytest.raises(HessianFlowError) as caught:
            built(make, **{argument: wrong})
        assert "\n" not in str(caught.value)


def test_the_arguments_were_found():
    names = {case.id for case in CASES}
    assert len(names) > 80
    assert {
        "ABSA-decay_factor",
        "LARS-form",
        "PGD-norm_mode",
        "ConcurrentAdversary-first",
        "Level-dropout",
    } <= names
