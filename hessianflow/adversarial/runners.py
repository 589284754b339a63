"""Runners of the attacks of :class:`concurrent.ConcurrentAdversary`.

One runs each attack at once, and one on a second CUDA stream. A third, which uses a second process,
has a module of its own (:mod:`worker`).
"""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from hessianflow.checks import check_choice
from hessianflow.interfaces import HessianFlowError, InputAttack
from hessianflow.measuring import unwrap
from hessianflow.normalisation.split import clean_rows, is_split

AttackSet = Literal["adversarial", "main"]


@dataclass(frozen=True)
class TwinAttack:
    """The attack on one batch, ready to run on any copy of the weights.

    Attributes:
        adversary: Attack that makes the twins.
        inputs: Inputs, shape [N, ...].
        targets: Targets, shape [N, ...].
        microbatch_size: Most rows in one forward pass; None stands for all.
        attack_set: Set of batch normalisation, in a model that splits it, for the attack.
    """

    adversary: InputAttack
    inputs: Tensor
    targets: Tensor
    microbatch_size: int | None = None
    attack_set: AttackSet = "adversarial"

    def __post_init__(self) -> None:
        check_choice("attack_set", self.attack_set, get_args(AttackSet))

    def __call__(self, weights: nn.Module) -> Tensor:
        """Return the twins of all rows."""
        inner = unwrap(weights)
        with ExitStack() as stack:
            if self.attack_set == "adversarial" and is_split(inner):
                stack.enter_context(clean_rows(inner, 0))
            return self.adversary.perturb(
                inner, self.inputs, self.targets, 1.0, self.microbatch_size
            )


@runtime_checkable
class AttackRunner(Protocol):
    """A runner that starts an attack with the present weights and gives its result later."""

    def submit(self, model: nn.Module, attack: TwinAttack) -> Callable[[], Tensor]:
        """Start `attack(model)` and return a callable that waits for its result.

        Later changes of the weights must not change the result.
        """


class Interleaved:
    """Run each attack at once, without a gain of speed, as the reference for every other runner."""

    def submit(self, model: nn.Module, attack: TwinAttack) -> Callable[[], Tensor]:
        """Run the attack and return a callable that gives its result."""
        result = attack(model)
        return lambda: result


class SecondStream:
    """Run attacks on a second CUDA stream, on a copy of the weights, while the main stream trains.

    The copy costs the memory of one model. It keeps the present weights and running statistics,
    which the training step changes meanwhile. The host never waits.
    """

    def __init__(self) -> None:
        self._replica: nn.Module | None = None
        self._stream: torch.cuda.Stream | None = None

    def submit(self, model: nn.Module, attack: TwinAttack) -> Callable[[], Tensor]:
        """Copy the weights on the current stream, then attack on the second.

        Raises:
            HessianFlowError: The model is not on a CUDA device.
        """
        inner = unwrap(model)
        device = next(inner.parameters()).device
        if device.type != "cuda":
            raise HessianFlowError(
                f"SecondStream needs a model on a CUDA device, got {device}: use Interleaved()"
            )
        main = torch.cuda.current_stream(device)
        stream = self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        main.wait_stream(stream)  # the previous attack may still read the replica
        replica = self._snapshot(inner)
        stream.wait_stream(main)
        # The caller may free them while the attack reads them.
        for tensor in (attack.inputs, attack.targets):
            tensor.record_stream(stream)
        with torch.cuda.stream(stream):
            result = attack(replica)
        done = stream.record_event()

        def wait() -> Tensor:
            taker = torch.cuda.current_stream(device)
            taker.wait_event(done)
            result.record_stream(taker)
            return result

        return wait

    def _snapshot(self, model: nn.Module) -> nn.Module:
        if self._replica is None:
            self._replica = copy.deepcopy(model)
            return self._replica
        for ours, theirs in zip(self._replica.modules(), model.modules(), strict=True):
            ours.training = theirs.training
        copy_weights(self._replica, model)
        return self._replica


@torch.no_grad()
def copy_weights(replica: nn.Module, model: nn.Module) -> None:
    """Copy the parameters and buffers of a model into its replica, on the current stream."""
    targets = [*replica.parameters(), *replica.buffers()]
    torch._foreach_copy_(targets, [*model.parameters(), *model.buffers()])
