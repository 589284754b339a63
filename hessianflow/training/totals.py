"""Running sums of an epoch, kept on the device until they are read."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hessianflow.interfaces import Decision, Hits, Progress, StepResult
from hessianflow.losses import Weight, exact_type
from hessianflow.runs.rows import place, spent_on
from hessianflow.training.divergence import ExplosionRule
from hessianflow.training.evaluate import Evaluation

UNREAD = 512
"""Results whose losses are joined into one tensor, without a read. This default is our choice."""


class RunningTotals:
    """Sums loss and hits, and finds divergences; adding a step never waits for the device.

    The sums are kept on `device`; `seconds` are the stopwatch's totals as the epoch begins.
    """

    def __init__(
        self, device: torch.device, seconds: Mapping[str, float], rule: ExplosionRule
    ) -> None:
        self._device = device
        self._exact = exact_type(device)
        self._rule = rule
        self.forget_divergence()
        self._last = self._nothing()
        self.start_epoch(seconds)

    def forget_divergence(self) -> None:
        """Drop the losses not judged yet, and the verdict, after a rollback."""
        self._joined: list[Tensor] = []
        self._unread: list[StepResult] = []
        self._updates = 0
        self._first_bad: int | None = None
        self._rule.forget_streak()

    def start_epoch(self, seconds: Mapping[str, float]) -> None:
        """Forget the previous epoch; `seconds` are the stopwatch's totals now."""
        self._seconds = dict(seconds)
        self._sum = self._nothing()
        self._gain = torch.zeros((), dtype=self._exact, device=self._device)
        self._with_twins = 0
        self._setting: dict[str, float] = {}
        self._latest: tuple[Decision, float, float] | None = None
        self._judge()
        self._rule.start_epoch()

    def add(
        self, result: StepResult, update: int, decision: Decision, rate: float, share: float
    ) -> None:
        """Add one optimizer step, at learning rate `rate` with `share` of its batch attacked."""
        self._last = result
        if result.twins is not None:
            self._gain += (result.twins.loss - result.loss) * result.rows
            self._with_twins += result.rows
        self._sum = self._sum + result
        self._unread.append(result)
        self._updates = update
        if len(self._unread) >= UNREAD:
            self._join()
        self._latest = (decision, rate, share)

    def last_loss(self) -> float:
        """Return the mean loss of the latest optimization batch (waits for the device)."""
        return float(self._last.loss)

    def means(self) -> tuple[float, float | None]:
        """Return mean loss (nan if no target counts) and accuracy so far; wait for the device."""
        correct, counted = self._sum.hits or (0, 0)
        sums: list[Weight] = [self._sum.total, self._sum.weight, correct, counted]
        total, weight, hits, targets = self._stacked([self._exactly(n) for n in sums]).tolist()
        loss = math.nan
        accuracy: float | None = None
        if weight:
            loss = total / weight
        if self._classified and targets:
            accuracy = hits / targets
        return loss, accuracy

    def first_bad_update(self, *, at_end: bool = False) -> int | None:
        """Return the first update whose loss diverged, or None (waits for the device).

        With `at_end`, the mean loss of the epoch is judged too.
        """
        self._judge()
        if at_end and self._first_bad is None and self._rule.epoch_exploded(self.means()[0]):
            self._first_bad = self._updates
        return self._first_bad

    def weights_grew(self, growth: float) -> int | None:
        """Return the first update that diverged, if weights that grew by this factor show it."""
        ago = self._rule.weights_tell(growth)
        if ago is None:
            return None
        return self._updates + 1 - ago

    def mean_so_far(self) -> float:
        """Return the mean loss of the updates of the run (waits for the device)."""
        self._judge()
        return self._rule.mean

    @property
    def in_doubt(self) -> bool:
        """Whether the latest losses read may be the beginning of a divergence."""
        return self._rule.in_doubt

    def _judge(self) -> None:
        self._join()
        losses = [loss for part in self._joined for loss in part.tolist()]
        self._joined = []
        first_bad = self._rule.first_bad(losses)
        if self._first_bad is None and first_bad is not None:
            self._first_bad = self._updates - len(losses) + 1 + first_bad

    def _join(self) -> None:
        """Join the losses held as single tensors into one, without reading it."""
        if not self._unread:
            return
        totals = torch.stack([result.total for result in self._unread])
        weights = self._stacked([result.weight for result in self._unread]).to(totals)
        self._joined.append(torch.where(weights > 0, totals / weights, 0.0))
        self._unread = []

    def _stacked(self, numbers: Sequence[Weight]) -> Tensor:
        if any(isinstance(number, Tensor) for number in numbers):
            return torch.stack([torch.as_tensor(n, device=self._device) for n in numbers])
        return torch.tensor(numbers, dtype=self._exact, device=self._device)

    def _nothing(self) -> StepResult:
        return StepResult(torch.zeros((), dtype=self._exact, device=self._device), 0)

    @property
    def _classified(self) -> bool:
        """Whether the hits of all rows since the epoch began are counted."""
        return self._sum.hits is not None or self._sum.rows == 0

    def _exactly(self, number: Weight) -> Tensor:
        return torch.as_tensor(number, dtype=self._exact, device=self._device)

    def epoch_row(
        self, progress: Progress, evaluation: Evaluation | None, seconds: Mapping[str, float]
    ) -> dict[str, Any]:
        """Return the row of the epoch just completed; `seconds` are the stopwatch's totals now."""
        loss, accuracy = self.means()
        row = {
            **place("epoch", progress),
            **self._last_setting(),
            "train_loss": loss,
            "train_accuracy": accuracy,
            "eval_loss": None,
            "eval_accuracy": None,
        }
        if evaluation is not None:
            row["eval_loss"] = evaluation.loss
            row["eval_accuracy"] = evaluation.accuracy
        if self._with_twins:
            # The excess of the twins' mean loss: below 0 the attacks are too stale.
            row["adversarial_gain"] = self._gain.item() / self._with_twins
        spent = {name: value - self._seconds[name] for name, value in seconds.items()}
        return row | spent_on(spent, self._sum.examples)

    def _last_setting(self) -> dict[str, float]:
        """Return batch size, rate, factor and share of the latest step of the epoch."""
        if self._latest is None:  # All steps of the epoch were made before an interruption.
            return dict(self._setting)
        decision, rate, share = self._latest
        return {
            "batch_size": decision.batch_size,
            "lr": rate,
            "lr_factor": decision.lr_factor,
            "adversarial_share": share,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, for a checkpoint in the middle of an epoch."""
        self._judge()
        none = torch.zeros((), dtype=torch.int64, device=self._device)
        correct, counted = self._sum.hits or Hits(none, 0)
        return {
            "loss": self._sum.total.clone(),
            "weight": self._exactly(self._sum.weight).clone(),
            "correct": correct.clone(),
            "counted": self._exactly(counted).clone(),
            "classified": self._classified,
            "examples": self._sum.examples,
            "trained": self._sum.rows,
            "gain": self._gain.clone(),
            "with_twins": self._with_twins,
            "setting": self._last_setting(),
            "seconds": dict(self._seconds),
            "explosion": self._rule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back the sums of :meth:`state_dict`."""
        rows = state["trained"]
        hits = None
        if rows > 0 and state["classified"]:
            hits = Hits(state["correct"].to(self._device), float(state["counted"]))
        total = state["loss"].to(self._device)
        self._sum = StepResult(total, float(state["weight"]), hits, rows, state["examples"])
        self._gain = state["gain"].to(self._device)
        self._with_twins = state["with_twins"]
        self._setting = dict(state["setting"])
        self._latest = None
        self._seconds = dict(state["seconds"])
        self.forget_divergence()
        self._rule.load_state_dict(state["explosion"])
