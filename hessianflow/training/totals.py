"""Running sums of an epoch, kept on the device until they are read."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hessianflow.interfaces import Decision, Progress
from hessianflow.losses import exact_type
from hessianflow.runs.rows import place, spent_on
from hessianflow.training.accumulate import BatchResult
from hessianflow.training.evaluate import Evaluation
from hessianflow.training.explosion import ExplosionRule

UNREAD = 512
"""Most losses held as single tensors; once there are this many, they are joined without being read.
Ours."""


class RunningTotals:
    """Loss, hits and the first update whose loss diverged; adding to them never waits for the
    device.

    Args:
        device: the device that holds the sums.
        seconds: the stopwatch's totals as the epoch begins.
        rule: judges the losses.
    """

    def __init__(
        self, device: torch.device, seconds: Mapping[str, float], rule: ExplosionRule
    ) -> None:
        self._device, self._rule = device, rule
        self.forget_divergence()
        self._last = torch.zeros((), device=device)
        self.start_epoch(seconds)

    def forget_divergence(self) -> None:
        """Start to watch afresh, after a rollback."""
        self._unread: list[Tensor] = []
        self._updates = 0
        self._first_bad: int | None = None
        self._rule.forget_streak()

    def start_epoch(self, seconds: Mapping[str, float]) -> None:
        """Forget the epoch before; `seconds`: the stopwatch's totals now."""
        self._seconds = dict(seconds)
        self._loss = torch.zeros((), dtype=exact_type(self._device), device=self._device)
        self._weight = torch.zeros_like(self._loss)
        self._correct = torch.zeros((), dtype=torch.int64, device=self._device)
        self._counted = torch.zeros_like(self._loss)
        self._classified = True
        self._examples = self._trained = self._with_twins = 0
        self._gain = torch.zeros_like(self._loss)
        self._setting: dict[str, float] = {}
        self._judge()
        self._rule.start_epoch()

    def add(
        self, result: BatchResult, update: int, decision: Decision, rate: float, share: float
    ) -> None:
        """Count one optimization batch, trained under `decision` at learning rate `rate` with
        `share` of it attacked."""
        self._last = result.loss
        self._loss += result.loss * result.weight  # where nothing counts, both are 0
        self._weight += result.weight
        if result.hits is None:
            self._classified = False
        else:
            self._correct += result.hits.correct
            self._counted += result.hits.counted
        if result.twin_loss is not None:
            self._gain += (result.twin_loss - result.loss) * result.trained
            self._with_twins += result.trained
        self._unread.append(result.loss.reshape(1))
        self._updates = update
        if len(self._unread) >= UNREAD:
            self._unread = [torch.cat(self._unread)]
        self._examples += result.examples
        self._trained += result.trained
        self._setting = {
            "batch_size": decision.batch_size,
            "lr": rate,
            "lr_factor": decision.lr_factor,
            "adversarial_share": share,
        }

    def last_loss(self) -> float:
        """Return the mean loss of the latest optimization batch (waits for the device)."""
        return float(self._last.item())

    def means(self) -> tuple[float, float | None]:
        """Return the mean loss, nan if no target counts, and accuracy since the epoch began (waits
        for the device)."""
        loss, weight, correct, counted = torch.stack(
            [self._loss, self._weight, self._correct.to(self._loss), self._counted]
        ).tolist()
        accuracy = correct / counted if self._classified and counted else None
        return loss / weight if weight else math.nan, accuracy

    def first_bad_update(self, *, at_end: bool = False) -> int | None:
        """Return the first update whose loss diverged, or None (waits for the device).

        With `at_end`, the mean loss of the epoch is judged too.
        """
        self._judge()
        if at_end and self._first_bad is None and self._rule.epoch_exploded(self.means()[0]):
            self._first_bad = self._updates
        return self._first_bad

    def weights_grew(self, growth: float) -> int | None:
        """Return the first update whose loss diverged, if weights that grew by such a factor show
        it."""
        ago = self._rule.weights_tell(growth)
        return None if ago is None else self._updates + 1 - ago

    def mean_so_far(self) -> float:
        """Return the mean loss of the updates of the run (waits for the device)."""
        self._judge()
        return self._rule.mean

    @property
    def in_doubt(self) -> bool:
        """Whether the latest losses read may be the beginning of a divergence."""
        return self._rule.in_doubt

    def _judge(self) -> None:
        losses = torch.cat(self._unread).tolist() if self._unread else []
        self._unread = []
        found = self._rule.first_bad(losses)
        if self._first_bad is None and found is not None:
            self._first_bad = self._updates - len(losses) + 1 + found

    def epoch_row(
        self, progress: Progress, evaluation: Evaluation | None, seconds: Mapping[str, float]
    ) -> dict[str, Any]:
        """Return the record of the epoch just completed; `seconds`: the stopwatch's totals now."""
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
        """Return by how much the twins' mean loss exceeds that of the clean rows: below 0 they are
        too stale to be harder."""
        return (
            {"adversarial_gain": self._gain.item() / self._with_twins} if self._with_twins else {}
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, for a checkpoint in the middle of an epoch."""
        self._judge()
        return {
            "loss": self._loss.clone(),
            "weight": self._weight.clone(),
            "correct": self._correct.clone(),
            "counted": self._counted.clone(),
            "classified": self._classified,
            "examples": self._examples,
            "trained": self._trained,
            "gain": self._gain.clone(),
            "with_twins": self._with_twins,
            "setting": dict(self._setting),
            "seconds": dict(self._seconds),
            "explosion": self._rule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._loss = state["loss"].to(self._device)
        # Earlier versions counted examples, and nothing else.
        trained = torch.tensor(float(state["trained"]), dtype=torch.float64)
        self._weight = state.get("weight", trained).to(self._loss)
        self._correct = state["correct"].to(self._device)
        self._counted = state.get("counted", trained).to(self._loss)
        self._classified, self._examples, self._trained = (
            state["classified"],
            state["examples"],
            state["trained"],
        )
        self._gain, self._with_twins = state["gain"].to(self._device), state["with_twins"]
        self._setting, self._seconds = dict(state["setting"]), dict(state["seconds"])
        self.forget_divergence()
        # states of earlier versions hold a limit, and the means begin anew
        if "explosion" in state:
            self._rule.load_state_dict(state["explosion"])
