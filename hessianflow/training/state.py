"""The whole state of a run, collected for checkpoints and put back."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hessianflow.interfaces import Decision, HessianFlowError, Stateful
from hessianflow.runs.states import restoring
from hessianflow.training import checkpoint
from hessianflow.training.checkpoint import ModelState
from hessianflow.training.lookahead import Lookahead
from hessianflow.training.optimizers import check_followed, label, set_mode
from hessianflow.training.steering import Steering
from hessianflow.training.step import TrainingStep


@dataclass
class RunState:
    """Everything that must survive an interruption, in the order in which it is taken and put back.

    Weights and optimizer come first, because everything else follows them; then the components,
    counters and time, and last the random generators, from which nothing may draw after that.

    Attributes:
        further: other parts with a state than every run has, by their keys in checkpoints.
        settings: the settings of this run as plain values; see :mod:`checkpoint`.
        components: all parts with a state besides weights and optimizer, by their keys in
            checkpoints and in order; None stands for a part that this run does not have.
    """

    step: TrainingStep
    steering: Steering
    ahead: Lookahead
    further: Mapping[str, Any]
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        task = self.step.task
        self.optimizer = task.optimizer
        self.model = ModelState(task.model, task.optimizer, task.loss_fn)
        self.course = self.steering.course
        self.stopwatch = self.step.stopwatch
        self.components = {**self._parts(), **self.further}

    def _parts(self) -> dict[str, Any]:
        """Return the parts that every run may have, in the order in which they are put back."""
        methods = self.step.methods
        accumulate = self.step.accumulate
        queue: Lookahead | None = None
        if self.ahead.depth > 0:
            queue = self.ahead
        return {
            "train_data": self.step.task.train_data,
            # The queue ends attacks under way, which change the adversary's state: it comes first.
            "look-ahead": queue,
            "controller": methods.controller,
            "adversary": methods.adversary,
            "probe": methods.probe,
            "learning rate": self.steering.rate,
            "loss scale": accumulate.scaler,
            "totals": self.steering.totals,
            "microbatch": self.step.microbatch,
            "loss": _stateful(accumulate.loss_fn, nn.Module),
            "transform": _stateful(methods.transform, Stateful),
            **numbered("observer", methods.observers),
        }

    def capture(
        self, history_bytes: int, rank_generators: Sequence[Any] | None = None
    ) -> dict[str, Any]:
        """Return the state as tensors and plain values only.

        `rank_generators` are the states of every rank's random generators; None: those of this rank
        stand for all.
        """
        counters = self.course.counters
        own = self.components
        parts: dict[str, Any] = dict.fromkeys(own)
        parts |= {n: checkpoint.plain(p.state_dict()) for n, p in own.items() if p is not None}
        state = {
            **self.model.capture(),
            "optimizer_class": label(self.optimizer),
            "optimizer": checkpoint.plain(self.optimizer.state_dict()),
            "parts": parts,
            "generators": checkpoint.generator_states(),
            "counters": self.course.state_dict(),
            "examples": counters.examples,
            "updates": counters.updates,
            "classes": {name: _label(name, part) for name, part in own.items()},
            "settings": checkpoint.plain(dict(self.settings)),
            "decision": checkpoint.plain(dict(vars(self.steering.decision))),
            "seconds": self.stopwatch.totals(),
            "history_bytes": history_bytes,
        }
        if rank_generators is not None:
            state["rank_generators"] = list(rank_generators)
        return state

    def restore(self, state: Mapping[str, Any], source: str, rank: int = 0) -> Decision:
        """Put everything back, on `rank` of a world of any size; return the decision in force.

        Raises:
            HessianFlowError: the state is of another model, of a run with other parts, or damaged;
                `source` names it.
        """
        with restoring(source):
            present = [name for name in self.components if self._is_in(state, name, source)]
            self._restore_trained(state, source)
            for name in present:
                self.components[name].load_state_dict(state["parts"][name])
            self.course.load_state_dict(state["counters"])
            self.stopwatch.load(state["seconds"])
            _restore_generators(state, rank)
            return Decision(**state["decision"])

    def _is_in(self, state: Mapping[str, Any], name: str, source: str) -> bool:
        """Return whether run and state have a part; refuse if one lacks it, or classes differ."""
        part = self.components[name]
        saved = state["parts"].get(name)
        if part is None and saved is None:
            return False
        if part is None:
            raise HessianFlowError(f"{source} was made with a {name}")
        if saved is None:
            raise HessianFlowError(f"{source} was made without a {name}")
        made = state["classes"].get(name)
        own = _label(name, part)
        if made != own:
            raise HessianFlowError(f"{source} was made with the {name} {made}, this run has {own}")
        return True

    def _restore_trained(self, state: Mapping[str, Any], source: str) -> None:
        """Put back the weights and the optimizer, and tell the parts that follow them."""
        own = label(self.optimizer)
        if state["optimizer_class"] != own:
            raise HessianFlowError(
                f"{source} was made with the optimizer {state['optimizer_class']}, this run has"
                f" {own}"
            )
        self.model.restore_model(state, source)
        # Checkpoints hold the weights of training: no later switch may replace them.
        set_mode(self.optimizer, training=True)
        saved = self.model.in_own_order(state, source)
        try:
            self.optimizer.load_state_dict(saved)  # type: ignore[arg-type]
        except ValueError as error:
            raise HessianFlowError(
                f"{source} has an optimizer with other parameter groups: {error}"
            ) from None
        check_followed(self.optimizer)
        self.model.restore_beside(state["beside"], source)
        self.step.follow(replan=True)


def _restore_generators(state: Mapping[str, Any], rank: int) -> None:
    """Give a rank its own random numbers, and new ones if the saved run did not have that rank."""
    every = state.get("rank_generators", [state["generators"]])
    if rank < len(every):
        checkpoint.restore_generators(every[rank])
    else:
        checkpoint.restore_generators(state["generators"])
        separate_generators(rank)


def _stateful(function: object, kind: type) -> Any:
    """Return a function that is of a kind with a state; None for any other."""
    if isinstance(function, kind):
        return function
    return None


def numbered(name: str, parts: Sequence[Any]) -> dict[str, Any]:
    """Return the parts as components "name 0", "name 1", ..."""
    return {f"{name} {number}": part for number, part in enumerate(parts)}


def _label(name: str, part: Any) -> str:
    """Return the class that a saved part must have; a learning rate compares schedulers itself."""
    if name == "learning rate":
        return type(part).__name__
    return label(part)


def separate_generators(rank: int) -> None:
    """Give a rank above 0 other random numbers than rank 0 has: its dropout must differ."""
    if rank > 0:
        state = torch.get_rng_state().numpy().tobytes()
        seed = int.from_bytes(hashlib.blake2b(state, digest_size=8).digest(), "big")
        torch.manual_seed((seed + rank) % 2**63)
