"""The whole state of a run, for checkpoints: collected here, put back here."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from hessianflow.interfaces import Decision, HessianFlowError
from hessianflow.measuring import unwrap
from hessianflow.training import checkpoint


@dataclass
class Counters:
    """The plain values of a run.

    Attributes:
        examples: trained so far.
        updates: optimizer steps so far.
        saved_at: `examples` at the last checkpoint.
        best: best evaluation accuracy so far.
        batch_cap: largest batch allowed since a divergence; None: no cap.
        cap_power: the learning rate goes with batch ^ cap_power where the cap holds it,
        cap_factor: and its factor is at most this.
        rollbacks: divergences rolled back.
        settled: updates after which everything that follows an update has been done, too.
    """

    examples: int = 0
    updates: int = 0
    saved_at: int = 0
    best: float | None = None
    batch_cap: int | None = None
    cap_power: float = 1.0
    cap_factor: float = math.inf
    rollbacks: int = 0
    settled: int = 0


class _Clock(Protocol):
    def totals(self) -> dict[str, float]: ...

    def load(self, totals: Mapping[str, float]) -> None: ...


@dataclass
class RunState:
    """Everything that must survive an interruption.

    Attributes:
        model: weights and buffers of the unwrapped module are kept.
        optimizer: its state.
        parts: by name, whatever else has `state_dict` and `load_state_dict`; None where this run has no such part.
        watch: seconds so far.
        counters: plain values.
    """

    model: nn.Module
    optimizer: Optimizer
    parts: Mapping[str, Any]
    watch: _Clock
    counters: Counters = field(default_factory=Counters)

    def capture(self, decision: Decision, history_bytes: int) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {
            "model": unwrap(self.model).state_dict(),
            "optimizer_class": type(self.optimizer).__name__,
            "optimizer": checkpoint.plain(self.optimizer.state_dict()),
            "parts": checkpoint.plain(
                {name: None if part is None else part.state_dict() for name, part in self.parts.items()}
            ),
            "generators": checkpoint.generator_states(),
            "counters": asdict(self.counters),
            "examples": self.counters.examples,
            "updates": self.counters.updates,
            "classes": {name: type(part).__name__ for name, part in self.parts.items()},
            "decision": checkpoint.plain(dict(vars(decision))),
            "seconds": self.watch.totals(),
            "history_bytes": history_bytes,
        }

    def restore(self, state: Mapping[str, Any], source: str, rank: int = 0) -> Decision:
        """Put everything back, on `rank` of a world of any size; returns the decision in force.

        Raises:
            HessianFlowError: the state is of another model, or of a run with other parts; `source` names it.
        """
        for name, part in self.parts.items():
            saved = state["parts"].get(name)
            if (part is None) != (saved is None):
                raise HessianFlowError(f"{source} was made {'with' if part is None else 'without'} a {name}")
            made = state["classes"][name]
            if made != type(part).__name__:
                raise HessianFlowError(f"{source} was made with the {name} {made}, this run has {type(part).__name__}")
        own = type(self.optimizer).__name__
        if state["optimizer_class"] != own:
            raise HessianFlowError(
                f"{source} was made with the optimizer {state['optimizer_class']}, this run has {own}"
            )
        checkpoint.load_model(unwrap(self.model), state["model"], source)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise HessianFlowError(f"{source} has an optimizer with other parameter groups: {error}") from None
        for name, part in self.parts.items():
            if part is not None:
                part.load_state_dict(state["parts"][name])
        self.counters = Counters(**state["counters"])
        self.watch.load(state["seconds"])
        every = state.get("rank_generators", [state["generators"]])
        checkpoint.restore_generators(every[rank] if rank < len(every) else state["generators"])
        if rank >= len(every):
            separate_generators(rank)
        return Decision(**state["decision"])


def separate_generators(rank: int) -> None:
    """Give a rank above 0 random numbers of its own where it has those of rank 0: its dropout must differ."""
    if rank > 0:
        seed = int.from_bytes(hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=8).digest(), "big")
        torch.manual_seed((seed + rank) % 2**63)
