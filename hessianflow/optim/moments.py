"""Squared gradient norms of microbatches and whole batches, from which controllers estimate noise.

The noise scale, CABS and DiveBatch read them. All sums stay on the device until a controller asks.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hessianflow.interfaces import NO_SIGNALS, Reducer
from hessianflow.optim.foreach import norms


class GradientMoments:
    """Squared gradient norms at two batch sizes, averaged between two calls of :meth:`signals`.

    With G the true gradient and S the trace of the covariance of one example's gradient, a mean
    gradient over b examples has E||g||^2 = ||G||^2 + S / b. Sizes are therefore reported as
    harmonic means, which keeps this exact when microbatches or steps differ in size.

    Signals (none before the first step):
        small_gradient_sq: Mean of ||g||^2 over microbatches.
        small_batch_size: Harmonic mean of their sizes.
        large_gradient_sq: Mean of ||g||^2 over whole optimization batches.
        large_batch_size: Harmonic mean of their sizes.
        gradient_sum_sq: ||sum of example gradients||^2, only with `accumulate`.
        gradient_examples: Number of these examples, only with `accumulate`.

    A single microbatch per step gives no estimate, since both sizes are then the same: set a
    smaller microbatch, or train on several ranks. With several ranks (`join`) the microbatches of
    all ranks count, at the cost of one small sum per step.

    Args:
        accumulate: Also sum the gradients (one more copy of the parameters), for DiveBatch.
    """

    def __init__(self, *, accumulate: bool = False) -> None:
        self.accumulate = accumulate
        self._sums = _Sums()
        self._watched: list[Tensor] = []
        self._reducer: Reducer | None = None

    def bind(self, parameters: Iterable[Tensor]) -> None:
        """Take later gradients as those of `parameters`, and keep the sums of earlier ones.

        Args:
            parameters: Trained parameters, in the order of the gradients.
        """
        before = self._watched
        self._watched = list(parameters)
        if self._sums.total and before:
            known = dict(zip(before, self._sums.total, strict=True))
            self._sums.total = [known.get(p, torch.zeros_like(p)) for p in self._watched]

    def join(self, reducer: Reducer) -> None:
        """Count the microbatches of all ranks from now on; drop those of an interrupted step."""
        self._reducer = reducer
        self._sums.begin_step()

    def on_microbatch(self, gradients: Sequence[Tensor], examples: int) -> None:
        """Add the gradient of one microbatch."""
        sums = self._sums
        sums.step_small = _plus(sums.step_small, gradients)
        sums.step_count += 1
        sums.step_inverse += 1 / examples

    def on_step(self, gradients: Sequence[Tensor], examples: int) -> None:
        """Add the gradient of one optimization batch."""
        sums = self._sums
        self._close_step(gradients[0].device)
        sums.large = _plus(sums.large, gradients)
        sums.large_count += 1
        sums.large_inverse += 1 / examples
        sums.examples += examples
        if self.accumulate:
            sums.total = _moved_to(sums.total, gradients)
            torch._foreach_add_(sums.total, list(gradients), alpha=examples)

    def _close_step(self, device: torch.device) -> None:
        """Add the microbatches of this step, on all ranks, to those of earlier steps."""
        sums = self._sums
        small = sums.step_small
        if small is None:  # a rank may have had no examples
            small = torch.zeros((), device=device)
        count: float | Tensor = sums.step_count
        inverse: float | Tensor = sums.step_inverse
        if self._reducer is not None and self._reducer.world_size > 1:
            own = torch.tensor([0.0, count, inverse], dtype=torch.float64, device=device)
            own[0] = small
            small, count, inverse = self._reducer.sum(own)
        if sums.small is not None:
            small = sums.small + small
        sums.small = small
        sums.small_count = sums.small_count + count
        sums.small_inverse = sums.small_inverse + inverse
        sums.begin_step()

    def signals(self) -> Mapping[str, float]:
        """Return the figures since the last call, and start again; this synchronises once."""
        sums = self._sums
        if sums.small is None or sums.large is None:
            return NO_SIGNALS
        figures = {
            "small_gradient_sq": float(sums.small) / float(sums.small_count),
            "small_batch_size": float(sums.small_count) / float(sums.small_inverse),
            "large_gradient_sq": float(sums.large) / sums.large_count,
            "large_batch_size": sums.large_count / sums.large_inverse,
        }
        if self.accumulate:
            figures["gradient_sum_sq"] = float(norms(sums.total).square().sum())
            figures["gradient_examples"] = float(sums.examples)
        self._sums = _Sums()
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the sums so far, since the observer continues to add to its own."""
        return copy.deepcopy(vars(self._sums))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; the sums move to the device of the next gradients."""
        self._sums = _Sums(**copy.deepcopy(dict(state)))


@dataclass
class _Sums:
    """Sums of GradientMoments since its last report, as device tensors and plain numbers."""

    step_small: Tensor | None = None
    step_count: int = 0
    step_inverse: float = 0.0
    small: Tensor | None = None
    small_count: float | Tensor = 0
    small_inverse: float | Tensor = 0.0
    large: Tensor | None = None
    large_count: int = 0
    large_inverse: float = 0.0
    examples: int = 0
    total: list[Tensor] = field(default_factory=list)

    def begin_step(self) -> None:
        """Drop the microbatches since the last whole step."""
        self.step_small = None
        self.step_count = 0
        self.step_inverse = 0.0


def _plus(total: Tensor | None, gradients: Sequence[Tensor]) -> Tensor:
    squared = norms(list(gradients)).square().sum()
    return squared if total is None else total.to(squared.device) + squared


def _moved_to(total: list[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return the total on the devices of the gradients, or zeros if there is none yet.

    A total from a checkpoint may be on another device.
    """
    if not total:
        return [torch.zeros_like(gradient) for gradient in gradients]
    return [own.to(gradient.device) for own, gradient in zip(total, gradients, strict=True)]
