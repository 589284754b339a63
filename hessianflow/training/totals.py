"""Running sums of an epoch, kept on the device until somebody asks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hessianflow.interfaces import Decision, Progress
from hessianflow.runs.rows import place, spent_on
from hessianflow.training.accumulate import BatchResult
from hessianflow.training.evaluate import Evaluation, float64_on

_NEVER = 2**62
EXPLODED = 100.0
"""A loss of this many times the run's first loss (or times 1, if that is smaller) counts as diverged. Ours."""


class RunningTotals:
    """Loss, hits and the first update whose loss diverged; adding to them never waits for the device.

    Diverged: not finite, or above :data:`EXPLODED` times the first loss of the run.

    Args:
        device: where the sums live.
        seconds: the stopwatch's totals as the epoch begins.
    """

    def __init__(self, device: torch.device, seconds: Mapping[str, float]) -> None:
        self._device = device
        self.forget_divergence()
        self._limit: Tensor | None = None
        self._last = torch.zeros((), device=device)
        self.start_epoch(seconds)

    def forget_divergence(self) -> None:
        """Start to watch afresh, after a rollback."""
        self._first_bad = torch.full((), _NEVER, dtype=torch.int64, device=self._device)

    def start_epoch(self, seconds: Mapping[str, float]) -> None:
        """Forget the epoch before; `seconds`: the stopwatch's totals now."""
        self._seconds = dict(seconds)
        self._loss = torch.zeros((), dtype=float64_on(self._device), device=self._device)
        self._correct = torch.zeros((), dtype=torch.int64, device=self._device)
        self._classified = True
        self._examples = self._trained = self._with_twins = 0
        self._gain = torch.zeros_like(self._loss)
        self._setting: dict[str, float] = {}

    def add(self, result: BatchResult, update: int, decision: Decision, rate: float) -> None:
        """Count one optimization batch, trained under `decision` at learning rate `rate`."""
        self._last = result.loss
        self._loss += result.loss * result.trained
        if result.correct is None:
            self._classified = False
        else:
            self._correct += result.correct
        if result.twin_loss is not None:
            self._gain += (result.twin_loss - result.loss) * result.trained
            self._with_twins += result.trained
        if self._limit is None:
            self._limit = EXPLODED * result.loss.abs().clamp(min=1)
        # A device-side minimum: the update at which the loss first diverged, without reading it now.
        bad = torch.where(result.loss <= self._limit, _NEVER, update)
        self._first_bad = torch.minimum(self._first_bad, bad)
        self._examples += result.examples
        self._trained += result.trained
        self._setting = {
            "batch_size": decision.batch_size,
            "lr": rate,
            "lr_factor": decision.lr_factor,
            "adversarial_share": decision.adversarial_share,
        }

    def last_loss(self) -> float:
        """Mean loss of the latest optimization batch (waits for the device)."""
        return float(self._last.item())

    def means(self) -> tuple[float, float | None]:
        """Mean loss and accuracy since the epoch began (waits for the device)."""
        count = max(self._trained, 1)
        return self._loss.item() / count, self._correct.item() / count if self._classified else None

    def first_bad_update(self) -> int | None:
        """The first update whose loss diverged, or None (waits for the device)."""
        update = int(self._first_bad.item())
        return None if update == _NEVER else update

    def epoch_row(
        self, progress: Progress, evaluation: Evaluation | None, seconds: Mapping[str, float]
    ) -> dict[str, Any]:
        """The record of the epoch just completed; `seconds`: the stopwatch's totals now."""
        loss, accuracy = self.means()
        spent = {name: value - self._seconds[name] for name, value in seconds.items()}
        return {
            **place("epoch", progress),
            **self._setting,
            "train_loss": loss,
            "train_accuracy": accuracy,
            "eval_loss": None if evaluation is None else evaluation.loss,
            "eval_accuracy": None if evaluation is None else evaluation.accuracy,
            **self._adversarial_gain(),
            **spent_on(spent, self._examples),
        }

    def _adversarial_gain(self) -> dict[str, float]:
        """By how much the twins' mean loss exceeds that of the clean rows: below 0 they are too stale to be harder."""
        return {"adversarial_gain": self._gain.item() / self._with_twins} if self._with_twins else {}

    def state_dict(self) -> dict[str, Any]:
        """The sums, for a checkpoint in the middle of an epoch."""
        return {
            "loss": self._loss.clone(),
            "correct": self._correct.clone(),
            "classified": self._classified,
            "examples": self._examples,
            "trained": self._trained,
            "gain": self._gain.clone(),
            "with_twins": self._with_twins,
            "setting": dict(self._setting),
            "seconds": dict(self._seconds),
            "limit": None if self._limit is None else self._limit.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._loss = state["loss"].to(self._device)
        self._correct = state["correct"].to(self._device)
        self._classified, self._examples, self._trained = state["classified"], state["examples"], state["trained"]
        self._gain, self._with_twins = state["gain"].to(self._device), state["with_twins"]
        self._setting, self._seconds = dict(state["setting"]), dict(state["seconds"])
        self._limit = None if state["limit"] is None else state["limit"].to(self._device)
