"""Running sums of an epoch, kept on the device until somebody asks."""

from collections.abc import Mapping
from typing import Any

import torch

from hessianflow.interfaces import Decision, Progress
from hessianflow.training.accumulate import BatchResult
from hessianflow.training.evaluate import Evaluation

_NEVER = 2**62


class RunningTotals:
    """Loss, hits and the first update with a non-finite loss; adding to them never waits for the device.

    Args:
        device: where the sums live.
        seconds: the stopwatch's totals as the epoch begins.
    """

    def __init__(self, device: torch.device, seconds: Mapping[str, float]) -> None:
        self._device = device
        self._first_bad = torch.full((), _NEVER, dtype=torch.int64, device=device)
        self.start_epoch(seconds)

    def start_epoch(self, seconds: Mapping[str, float]) -> None:
        """Forget the epoch before; `seconds`: the stopwatch's totals now."""
        self._seconds = dict(seconds)
        self._loss = torch.zeros((), dtype=torch.float32, device=self._device)
        self._correct = torch.zeros((), dtype=torch.int64, device=self._device)
        self._classified = True
        self._examples = 0
        self._setting: dict[str, float] = {}

    def add(self, result: BatchResult, update: int, decision: Decision, rate: float) -> None:
        """Count one optimization batch, trained under `decision` at learning rate `rate`."""
        self._loss += result.loss * result.examples
        if result.correct is None:
            self._classified = False
        else:
            self._correct += result.correct
        # A device-side minimum: the update at which the loss first was not finite, without reading it now.
        bad = torch.where(torch.isfinite(result.loss), _NEVER, update)
        self._first_bad = torch.minimum(self._first_bad, bad)
        self._examples += result.examples
        self._setting = {
            "batch_size": decision.batch_size,
            "lr": rate,
            "adversarial_share": decision.adversarial_share,
        }

    def means(self) -> tuple[float, float | None]:
        """Mean loss and accuracy since the epoch began (waits for the device)."""
        count = max(self._examples, 1)
        return self._loss.item() / count, self._correct.item() / count if self._classified else None

    def first_bad_update(self) -> int | None:
        """The first update whose loss was not finite, or None (waits for the device)."""
        update = int(self._first_bad.item())
        return None if update == _NEVER else update

    def epoch_row(
        self, progress: Progress, evaluation: Evaluation | None, seconds: Mapping[str, float]
    ) -> dict[str, Any]:
        """The record of the epoch just completed; `seconds`: the stopwatch's totals now."""
        loss, accuracy = self.means()
        spent = {name: value - self._seconds[name] for name, value in seconds.items()}
        return {
            "kind": "epoch",
            "epoch": progress.epoch,
            "examples": progress.examples,
            "updates": progress.updates,
            **self._setting,
            "train_loss": loss,
            "train_accuracy": accuracy,
            "eval_loss": None if evaluation is None else evaluation.loss,
            "eval_accuracy": None if evaluation is None else evaluation.accuracy,
            "seconds": spent["wall"],
            "images_per_second": self._examples / max(spent["training"], 1e-9),
            "seconds_training": spent["training"] - spent["adversary"],
            "seconds_adversary": spent["adversary"],
            "seconds_curvature": spent["curvature"],
            "seconds_evaluation": spent["evaluation"],
        }

    def state_dict(self) -> dict[str, Any]:
        """The sums, for a checkpoint in the middle of an epoch."""
        return {
            "loss": self._loss.clone(),
            "correct": self._correct.clone(),
            "classified": self._classified,
            "examples": self._examples,
            "setting": dict(self._setting),
            "seconds": dict(self._seconds),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._loss = state["loss"].to(self._device)
        self._correct = state["correct"].to(self._device)
        self._classified, self._examples = state["classified"], state["examples"]
        self._setting, self._seconds = dict(state["setting"]), dict(state["seconds"])
