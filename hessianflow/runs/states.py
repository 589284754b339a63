"""The form of a checkpoint, checked as a whole before any of it is used.

A checkpoint is a dict of tensors, numbers, text, lists and dicts. The entry of a component of the
run (a controller, a probe) has a form of its own, which the component's `load_state_dict` checks;
it is called inside :func:`restoring`.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from hessianflow.interfaces import HessianFlowError
from hessianflow.runs.schema import Count, Fault, Figure, Number, Size, fault_of, first_fault, shown

_DEEPEST = 40
_BROKEN = (
    *(KeyError, TypeError, ValueError, AttributeError, IndexError),
    *(ArithmeticError, AssertionError, RuntimeError),
)
"""Errors that Python, NumPy and torch raise over a damaged state."""


class DamagedStateError(HessianFlowError):
    """Error for a checkpoint that no run could have written; an older one may be whole."""


class _Weights(TypedDict):
    model: dict[str, Any]


class _Common(_Weights):
    generators: dict[str, Any]
    examples: Count
    updates: Count
    seconds: dict[str, Figure]
    history_bytes: Count


class _Decision(TypedDict):
    batch_size: Size
    lr_factor: float
    attack_factor: float
    reason: str


class _Optimizer(TypedDict):
    state: dict[Any, Any]
    param_groups: list[dict[str, Any]]


class _CountersRequired(TypedDict):
    examples: Count
    updates: Count
    saved_at: Count
    best: Number | None
    batch_cap: Size | None
    cap_power: Number
    cap_factor: Number
    rollbacks: Count
    settled: Count


class _Counters(_CountersRequired, total=False):
    epoch: Count
    place: Count
    steps: Count
    passes: Count
    read: Count
    best_loss: Number | None
    best_figure: Number | None
    waited: Count
    ended_early: bool


class _TrainingRequired(_Common):
    counters: _Counters
    optimizer_class: str
    optimizer: _Optimizer
    parts: dict[str, dict[str, Any] | None]
    classes: dict[str, str]
    decision: _Decision


class TrainingState(_TrainingRequired, total=False):
    """The checkpoint of a trainer (`hessianflow.training.state`), with optional newer entries."""

    rank_generators: list[dict[str, Any]]
    late_buffers: list[str]
    transient_buffers: dict[str, Tensor]
    trainable: list[str]
    built_trainable: list[str]
    evaluating: list[str]
    groups: list[list[str]]
    beside: list[Tensor]
    settings: dict[str, Any]


class _Server(TypedDict):
    weights: Tensor
    commits: Count
    workers: dict[int, tuple[float, Count, Count | None]]
    round: dict[int, tuple[float, Tensor]]
    in_round: bool


class _ServerSessionRequired(TypedDict):
    server: _Server


class _LocalRequired(TypedDict):
    next: Count
    optimizer: _Optimizer


class _Local(_LocalRequired, total=False):
    loss_scale: dict[str, Any]


class _ServerSession(_ServerSessionRequired, total=False):
    clock: float
    events: list[tuple[float, Count]]
    running: dict[int, tuple[float, Count, Tensor]]
    workers: dict[int, _Local]


class _ServerCounters(TypedDict):
    commits: Count
    examples: Count
    updates: Count
    clock: Number
    predicted: Number
    best: Number | None
    training_seconds: Number
    loss: Number
    weight: Number
    correct: int
    counted: Number
    trained: Count
    seconds: dict[str, Figure]


class DualBatchState(_Common):
    """The checkpoint of a parameter-server run; `dual_batch` is None before the first push."""

    counters: _ServerCounters
    dual_batch: _ServerSession | None


def check_weights(state: Mapping[str, Any]) -> None:
    """Refuse a checkpoint without usable weights.

    Raises:
        DamagedStateError: An entry is wrong; the message names it.
    """
    _refuse(fault_of(state, _Weights) or _tensor_fault(state))


def check_training_state(state: Mapping[str, Any]) -> None:
    """Refuse a trainer's checkpoint that is not whole.

    Raises:
        HessianFlowError: The checkpoint is of a run on a parameter server.
        DamagedStateError: An entry is missing or has the wrong form; the message names it.
    """
    if "dual_batch" in state:
        raise HessianFlowError("the checkpoint is of a run on a parameter server")
    decision = state.get("decision")
    if isinstance(decision, Mapping) and "adversarial_share" in decision:
        raise HessianFlowError(
            "a development version before 0.1.0 made it: such a run can be measured (hessianflow"
            " spectrum, robustness), but not continued"
        )
    _refuse(fault_of(state, TrainingState) or _tensor_fault(state))
    for number, generators in enumerate(state.get("rank_generators", ())):
        _refuse(_generators_fault(generators, f"rank_generators.{number}"))
    _refuse(_generators_fault(state["generators"], "generators"))
    for name in ("examples", "updates"):
        if state[name] != state["counters"][name]:
            raise DamagedStateError(
                f"{name} is {state[name]}, but counters.{name} {state['counters'][name]}"
            )


def check_dual_batch_state(state: Mapping[str, Any]) -> None:
    """Refuse a parameter-server run's checkpoint that is not whole.

    Raises:
        HessianFlowError: The checkpoint is of another kind of run.
        DamagedStateError: An entry is missing or has the wrong form; the message names it.
    """
    if "dual_batch" not in state:
        raise HessianFlowError("the checkpoint is of a run without a parameter server")
    _refuse(fault_of(state, DualBatchState) or _tensor_fault(state))
    _refuse(_generators_fault(state["generators"], "generators"))


def model_fault(model: nn.Module, state: Mapping[str, Any]) -> str | None:
    """Return how saved weights differ in name, shape or type from a model's; None if equal."""
    own = model.state_dict()
    for name in [*own, *state]:
        if name not in state:
            return f"only the model has {name!r}"
        if name not in own:
            return f"only the checkpoint has {name!r}"
        mine = own[name]
        saved = state[name]
        if not isinstance(mine, Tensor):  # a module's extra state has a form of its own
            continue
        if not isinstance(saved, Tensor):
            return f"{name!r} is {shown(saved)} there, a tensor here"
        if mine.shape != saved.shape:
            return f"{name!r} has shape {list(saved.shape)} there, {list(mine.shape)} here"
        if mine.dtype != saved.dtype:
            kinds = [str(one.dtype).removeprefix("torch.") for one in (saved, mine)]
            return f"{name!r} is {kinds[0]} there, {kinds[1]} here"
    return None


def check_finite(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse trained weights that are not finite, since a run never saves any.

    Raises:
        DamagedStateError: A weight is not finite; the message names it.
    """
    for name, parameter in model.named_parameters():
        saved = state.get(name)
        if (
            parameter.requires_grad
            and isinstance(saved, Tensor)
            and not bool(torch.isfinite(saved).all())
        ):
            raise DamagedStateError(f"model.{name} holds numbers that are not finite")


@contextmanager
def restoring(source: str) -> Iterator[None]:
    """Turn any error over a damaged entry of a state from `source` into a one-line error.

    Raises:
        DamagedStateError: An entry is missing or has the wrong form.
    """
    try:
        yield
    except (HessianFlowError, torch.OutOfMemoryError):
        raise
    except _BROKEN as error:
        text = " ".join(str(error).split())
        raise DamagedStateError(
            f"{source} cannot be put back: it is damaged, or of another release"
            f" ({type(error).__name__}: {text[:120]})"
        ) from error


def _refuse(fault: Fault | None) -> None:
    if fault is not None:
        raise DamagedStateError(str(fault))


def _tensor_fault(value: Any, depth: int = 0) -> Fault | None:
    """Return the first tensor that is not plain, dense and on the CPU, or too deep a nesting."""
    if isinstance(value, Tensor):
        plain = value.layout is torch.strided and value.device.type == "cpu"
        if plain and not value.is_quantized:
            return None
        return Fault("", f"must be a plain tensor, got {_sort(value)}")
    if depth > _DEEPEST:
        return Fault("", f"is nested deeper than {_DEEPEST}")
    return first_fault(value, lambda entry: _tensor_fault(entry, depth + 1))


def _sort(value: Tensor) -> str:
    if value.is_quantized:
        return "a quantized one"
    if value.layout is torch.strided:
        return f"one on {value.device.type}"
    return f"a {str(value.layout).removeprefix('torch.')} one"


def _generators_fault(states: Mapping[str, Any], where: str) -> Fault | None:
    """Return the first state of a generator that cannot be set, tried on temporary generators."""
    for name, trial in _TRIALS.items():
        if name not in states:
            return Fault(f"{where}.{name}", "is missing")
        try:
            trial(states[name])
        except _BROKEN as error:
            reason = " ".join(str(error).split())[:80]
            return Fault(f"{where}.{name}", f"is no state of a generator ({reason})")
    cuda = states.get("cuda", [])
    if not isinstance(cuda, list) or not all(
        isinstance(one, Tensor) and one.dtype == torch.uint8 for one in cuda
    ):
        return Fault(f"{where}.cuda", f"must be a list of tensors of bytes, got {shown(cuda)}")
    return None


def _try_python(state: Any) -> None:
    kind, words, gauss = state
    random.Random().setstate((kind, tuple(words), gauss))


_TRIALS: Mapping[str, Callable[[Any], Any]] = {
    "torch": lambda state: torch.Generator().set_state(state),
    "numpy": lambda state: np.random.RandomState().set_state(state),
    "python": _try_python,
}
