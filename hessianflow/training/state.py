"""The whole state of a run, for checkpoints: collected here, put back here."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hessianflow.interfaces import Decision, HessianFlowError, Stateful
from hessianflow.runs.states import restoring
from hessianflow.training import checkpoint
from hessianflow.training.course import Course
from hessianflow.training.lookahead import Lookahead
from hessianflow.training.model_state import ModelState
from hessianflow.training.optimizers import check_followed, label, set_mode
from hessianflow.training.steering import Steering
from hessianflow.training.step import TrainingStep
from hessianflow.training.timing import Stopwatch


@dataclass(frozen=True)
class Component:
    """A part of a run that has a state.

    Attributes:
        name: the name that checkpoints know it by.
        part: whatever has `state_dict` and `load_state_dict`; None where this run has none.
    """

    name: str
    part: Any


@dataclass
class RunState:
    """Everything that must survive an interruption, in the order in which it is taken and put back.

    First come weights and optimizer, for everything else follows them; then the components, then
    counters and time, and last the random generators, from which nothing may draw any more.

    Attributes:
        model: weights, buffers and what goes with them.
        optimizer: its state.
        components: whatever else has a state, in order.
        stopwatch: seconds so far.
        settings: of this run, plain values; see :mod:`settings`.
        follow: tells the parts what is trained, once model and optimizer are back.
        course: the counters.
    """

    model: ModelState
    optimizer: Optimizer
    components: list[Component]
    stopwatch: Stopwatch
    settings: Mapping[str, Any]
    follow: Callable[[], None]
    course: Course

    def capture(
        self, decision: Decision, history_bytes: int, rank_generators: Sequence[Any] | None = None
    ) -> dict[str, Any]:
        """Return the state as tensors and plain values only.

        Args:
            decision: in force.
            history_bytes: length of the history so far.
            rank_generators: the states of every rank's random generators; None: those of this rank
                stand for all.
        """
        counters = self.course.counters
        state = {
            **self.model.capture(),
            "optimizer_class": label(self.optimizer),
            "optimizer": checkpoint.plain(self.optimizer.state_dict()),
            "parts": {c.name: _captured(c.part) for c in self.components},
            "generators": checkpoint.generator_states(),
            "counters": self.course.state_dict(),
            "examples": counters.examples,
            "updates": counters.updates,
            "classes": {c.name: _label(c) for c in self.components},
            "settings": checkpoint.plain(dict(self.settings)),
            "decision": checkpoint.plain(dict(vars(decision))),
            "seconds": self.stopwatch.totals(),
            "history_bytes": history_bytes,
        }
        if rank_generators is not None:
            state["rank_generators"] = list(rank_generators)
        return state

    def restore(self, state: Mapping[str, Any], source: str, rank: int = 0) -> Decision:
        """Put everything back, on `rank` of a world of any size; returns the decision in force.

        Raises:
            HessianFlowError: the state is of another model, of a run with other parts, or damaged;
                `source` names it.
        """
        with restoring(source):
            present = [c for c in self.components if _is_in(state, c, source)]
            self._restore_trained(state, source)
            for component in present:
                component.part.load_state_dict(state["parts"][component.name])
            self.course.load_state_dict(state["counters"])
            self.stopwatch.load(state["seconds"])
            _restore_generators(state, rank)
            return Decision(**state["decision"])

    def _restore_trained(self, state: Mapping[str, Any], source: str) -> None:
        """Put back the weights and the optimizer, and tell whoever follows them."""
        own = label(self.optimizer)
        if state["optimizer_class"] not in (own, type(self.optimizer).__name__):
            raise HessianFlowError(
                f"{source} was made with the optimizer {state['optimizer_class']}, this run has"
                f" {own}"
            )
        self.model.restore_model(state, source)
        # as it was saved: nothing is to be swapped in after the state is back
        set_mode(self.optimizer, training=True)
        saved = self.model.in_own_order(state, source)
        try:
            self.optimizer.load_state_dict(saved)  # type: ignore[arg-type]
        except ValueError as error:
            raise HessianFlowError(
                f"{source} has an optimizer with other parameter groups: {error}"
            ) from None
        check_followed(self.optimizer)
        if "beside" in state:  # earlier versions do not keep them
            self.model.restore_beside(state["beside"], source)
        self.follow()


def _captured(part: Any) -> Any:
    return None if part is None else checkpoint.plain(part.state_dict())


def _restore_generators(state: Mapping[str, Any], rank: int) -> None:
    """Give a rank its own random numbers; one that the saved run did not have gets new ones."""
    every = state.get("rank_generators", [state["generators"]])
    if rank < len(every):
        checkpoint.restore_generators(every[rank])
    else:
        checkpoint.restore_generators(state["generators"])
        separate_generators(rank)


def components(ahead: Lookahead, step: TrainingStep, steering: Steering) -> list[Component]:
    """Return the components of every run, in the order in which they are taken and put back."""
    control = steering.control
    accumulate = step.accumulate
    loss = accumulate.loss_fn if isinstance(accumulate.loss_fn, nn.Module) else None
    transform = step.transform if isinstance(step.transform, Stateful) else None
    return [
        Component("train_data", steering.train_data),
        # Before the adversary: its attacks under way end first, when states are taken as when they
        # are put back.
        Component("look-ahead", ahead if ahead.depth > 0 else None),
        Component("controller", control.controller),
        Component("adversary", step.adversary),
        Component("probe", control.probe),
        Component("learning rate", steering.rate),
        Component("loss scale", accumulate.scaler),
        Component("totals", steering.totals),
        Component("microbatch", step.microbatch),
        Component("loss", loss),
        Component("transform", transform),
        *numbered("observer", control.observers),
    ]


def numbered(name: str, parts: Sequence[Any]) -> list[Component]:
    """Return the parts as components "name 0", "name 1", ..."""
    return [Component(f"{name} {number}", part) for number, part in enumerate(parts)]


def _is_in(state: Mapping[str, Any], component: Component, source: str) -> bool:
    """Return whether this run has such a part and the checkpoint has its state.

    Raises:
        HessianFlowError: one of the two lacks it, or it is of another class.
    """
    name = component.name
    part = component.part
    if name not in state["parts"] and "settings" not in state:
        return False  # earlier versions kept fewer parts
    if (part is None) != (state["parts"].get(name) is None):
        made = "with" if part is None else "without"
        raise HessianFlowError(f"{source} was made {made} a {name}")
    saved = state["classes"].get(name)
    own = _label(component)
    if part is not None and saved not in (own, type(part).__name__):
        raise HessianFlowError(f"{source} was made with the {name} {saved}, this run has {own}")
    return part is not None


def _label(component: Component) -> str:
    """Return what a part must be to take up a state; a learning rate compares schedulers itself."""
    if component.name == "learning rate":
        return type(component.part).__name__
    return label(component.part)


def separate_generators(rank: int) -> None:
    """Give a rank above 0 random numbers of its own where it has those of rank 0: its dropout must
    differ."""
    if rank > 0:
        seed = int.from_bytes(
            hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=8).digest(), "big"
        )
        torch.manual_seed((seed + rank) % 2**63)
