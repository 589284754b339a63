"""The whole state of a run, for checkpoints: collected here, put back here."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from hessianflow.interfaces import Decision, HessianFlowError, ResizableBatches, Stateful
from hessianflow.runs.states import restoring
from hessianflow.training import checkpoint
from hessianflow.training.control_point import ControlPoint
from hessianflow.training.learning_rate import LearningRate
from hessianflow.training.lookahead import Lookahead
from hessianflow.training.model_state import ModelState
from hessianflow.training.optimizers import check_followed, label, set_mode
from hessianflow.training.step import TrainingStep
from hessianflow.training.totals import RunningTotals


@dataclass
class Counters:
    """The plain values of a run.

    Attributes:
        examples: trained so far.
        updates: optimizer steps so far.
        epoch: epochs completed.
        place: examples of the epoch under way that were trained.
        saved_at: `examples` at the last checkpoint.
        best: best evaluation accuracy so far.
        best_loss: lowest evaluation loss so far, where there is no accuracy.
        batch_cap: largest batch allowed since a divergence; None: no cap.
        cap_power: the learning rate goes with batch ^ cap_power where the cap holds it,
        cap_factor: and its factor is at most this.
        rollbacks: divergences rolled back.
        settled: updates after which everything that follows an update has been done, too.
    """

    examples: int = 0
    updates: int = 0
    epoch: int = 0
    place: int = 0
    saved_at: int = 0
    best: float | None = None
    best_loss: float | None = None
    batch_cap: int | None = None
    cap_power: float = 1.0
    cap_factor: float = math.inf
    rollbacks: int = 0
    settled: int = 0

    def is_best(self, accuracy: float | None, loss: float) -> bool:
        """Return whether the model is better than ever: by its accuracy, or by its loss where there
        is none; remembers it."""
        if accuracy is not None:
            is_best = self.best is None or accuracy > self.best
            self.best = accuracy if is_best else self.best
            return is_best
        is_best = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        self.best_loss = loss if is_best else self.best_loss
        return is_best


class _Clock(Protocol):
    def totals(self) -> dict[str, float]: ...

    def load(self, totals: Mapping[str, float]) -> None: ...


@dataclass
class RunState:
    """Everything that must survive an interruption.

    Attributes:
        model: weights, buffers and what goes with them.
        optimizer: its state.
        parts: by name, whatever else has `state_dict` and `load_state_dict`; None where this run
            has no such part.
        watch: seconds so far.
        settings: of this run, plain values; see :mod:`settings`.
        follow: tells the parts what is trained, once model and optimizer are back.
        counters: plain values.
    """

    model: ModelState
    optimizer: Optimizer
    parts: Mapping[str, Any]
    watch: _Clock
    settings: Mapping[str, Any]
    follow: Callable[[], None]
    counters: Counters = field(default_factory=Counters)

    def capture(self, decision: Decision, history_bytes: int) -> dict[str, Any]:
        """Return the state as tensors and plain values only."""
        return {
            **self.model.capture(),
            "optimizer_class": label(self.optimizer),
            "optimizer": checkpoint.plain(self.optimizer.state_dict()),
            "parts": checkpoint.plain(
                {
                    name: None if part is None else part.state_dict()
                    for name, part in self.parts.items()
                }
            ),
            "generators": checkpoint.generator_states(),
            "counters": asdict(self.counters),
            "examples": self.counters.examples,
            "updates": self.counters.updates,
            "classes": {name: _label(name, part) for name, part in self.parts.items()},
            "settings": checkpoint.plain(dict(self.settings)),
            "decision": checkpoint.plain(dict(vars(decision))),
            "seconds": self.watch.totals(),
            "history_bytes": history_bytes,
        }

    def restore(self, state: Mapping[str, Any], source: str, rank: int = 0) -> Decision:
        """Put everything back, on `rank` of a world of any size; returns the decision in force.

        Raises:
            HessianFlowError: the state is of another model, of a run with other parts, or damaged;
                `source` names it.
        """
        with restoring(source):
            return self._restore(state, source, rank)

    def _restore(self, state: Mapping[str, Any], source: str, rank: int) -> Decision:
        present = {
            name: part for name, part in self.parts.items() if _is_in(state, name, part, source)
        }
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
        for name, part in present.items():
            part.load_state_dict(state["parts"][name])
        self.counters = self._counters(state["counters"])
        self.watch.load(state["seconds"])
        every = state.get("rank_generators", [state["generators"]])
        checkpoint.restore_generators(every[rank] if rank < len(every) else state["generators"])
        if rank >= len(every):
            separate_generators(rank)
        return Decision(**state["decision"])

    def _counters(self, saved: Mapping[str, Any]) -> Counters:
        """Earlier versions count examples alone, and every epoch has as many as the data."""
        epoch, place = divmod(saved["examples"], self.parts["train_data"].num_examples)
        return Counters(**{"epoch": epoch, "place": place, **saved})


def stateful_parts(
    train_data: ResizableBatches,
    ahead: Lookahead,
    control: ControlPoint,
    step: TrainingStep,
    rate: LearningRate,
    totals: RunningTotals,
) -> dict[str, Any]:
    """Return the parts of every run, by the names that checkpoints know them by."""
    accumulate = step.accumulate
    return {
        "train_data": train_data,
        # Before the adversary: its attacks under way end first, when states are taken as when they
        # are put back.
        "look-ahead": ahead if ahead.depth > 0 else None,
        "controller": control.controller,
        "adversary": step.adversary,
        "probe": control.probe,
        "learning rate": rate,
        "loss scale": accumulate.scaler,
        "totals": totals,
        "microbatch": step.microbatch,
        "loss": accumulate.loss_fn if isinstance(accumulate.loss_fn, nn.Module) else None,
        "transform": step.transform if isinstance(step.transform, Stateful) else None,
        **numbered("observer", accumulate.observers),
    }


def numbered(name: str, parts: Sequence[Any]) -> dict[str, Any]:
    """Return the parts as "name 0", "name 1", ..."""
    return {f"{name} {number}": part for number, part in enumerate(parts)}


def _is_in(state: Mapping[str, Any], name: str, part: object, source: str) -> bool:
    """Return whether this run has such a part and the checkpoint has its state.

    Raises:
        HessianFlowError: one of the two lacks it, or it is of another class.
    """
    if name not in state["parts"] and "settings" not in state:
        return False  # earlier versions kept fewer parts
    if (part is None) != (state["parts"].get(name) is None):
        raise HessianFlowError(
            f"{source} was made {'with' if part is None else 'without'} a {name}"
        )
    made, own = state["classes"].get(name), _label(name, part)
    if part is not None and made not in (own, type(part).__name__):
        raise HessianFlowError(f"{source} was made with the {name} {made}, this run has {own}")
    return part is not None


def _label(name: str, part: object) -> str:
    """Return what a part must be to take up a state; a learning rate compares schedulers itself."""
    return type(part).__name__ if name == "learning rate" else label(part)


def separate_generators(rank: int) -> None:
    """Give a rank above 0 random numbers of its own where it has those of rank 0: its dropout must
    differ."""
    if rank > 0:
        seed = int.from_bytes(
            hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=8).digest(), "big"
        )
        torch.manual_seed((seed + rank) % 2**63)
