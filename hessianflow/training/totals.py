"""Running sums of an epoch, kept on the device until they are read."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hessianflow.interfaces import Decision, Hits, Progress, StepResult
from hessianflow.losses import Weight, exact_type
from hessianflow.runs.rows import place, spent_on
from hessianflow.training.evaluate import Evaluation
from hessianflow.training.explosion import ExplosionRule

UNREAD = 512
"""Most results held one by one; once there are this many, their losses are joined without being
read. Ours."""


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
        self._device = device
        self._exact = exact_type(device)
        self._rule = rule
        self.forget_divergence()
        self._last = self._nothing()
        self.start_epoch(seconds)

    def forget_divergence(self) -> None:
        """Start to watch afresh, after a rollback."""
        self._joined: list[Tensor] = []
        self._unread: list[StepResult] = []
        self._updates = 0
        self._first_bad: int | None = None
        self._rule.forget_streak()

    def start_epoch(self, seconds: Mapping[str, float]) -> None:
        """Forget the epoch before; `seconds`: the stopwatch's totals now."""
        self._seconds = dict(seconds)
        self._sum = self._nothing()
        self._gain = torch.zeros((), dtype=self._exact, device=self._device)
        self._with_twins = 0
        self._setting: dict[str, float] = {}
        self._decision: Decision | None = None
        self._rate = 0.0
        self._share = 0.0
        self._judge()
        self._rule.start_epoch()

    def add(
        self, result: StepResult, update: int, decision: Decision, rate: float, share: float
    ) -> None:
        """Count one optimization batch, trained under `decision` at learning rate `rate` with
        `share` of it attacked."""
        self._last = result
        if result.twins is not None:
            self._gain += (result.twins.loss - result.loss) * result.rows
            self._with_twins += result.rows
        self._sum = self._sum + result
        self._unread.append(result)
        self._updates = update
        if len(self._unread) >= UNREAD:
            self._join()
        self._decision = decision
        self._rate = rate
        self._share = share

    def last_loss(self) -> float:
        """Return the mean loss of the latest optimization batch (waits for the device)."""
        return float(self._last.loss)

    def means(self) -> tuple[float, float | None]:
        """Return the mean loss, nan if no target counts, and accuracy since the epoch began (waits
        for the device)."""
        total, weight, correct, counted = self._read()
        loss = total / weight if weight else math.nan
        accuracy = correct / counted if self._classified and counted else None
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
        self._join()
        losses = [loss for part in self._joined for loss in part.tolist()]
        self._joined = []
        found = self._rule.first_bad(losses)
        if self._first_bad is None and found is not None:
            self._first_bad = self._updates - len(losses) + 1 + found

    def _join(self) -> None:
        """Put the losses held as single tensors into one, without reading it."""
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

    def _read(self) -> list[float]:
        """Return the sums of losses, their weight, hits and targets that count (waits for the
        device)."""
        correct: Weight = 0
        counted: Weight = 0
        if self._sum.hits is not None:
            correct, counted = self._sum.hits
        figures = [self._sum.total, self._sum.weight, correct, counted]
        return self._stacked([self._exactly(figure) for figure in figures]).tolist()

    def _exactly(self, number: Weight) -> Tensor:
        return torch.as_tensor(number, dtype=self._exact, device=self._device)

    def epoch_row(
        self, progress: Progress, evaluation: Evaluation | None, seconds: Mapping[str, float]
    ) -> dict[str, Any]:
        """Return the record of the epoch just completed; `seconds`: the stopwatch's totals now."""
        loss, accuracy = self.means()
        spent = {name: value - self._seconds[name] for name, value in seconds.items()}
        return {
            **place("epoch", progress),
            **self._last_setting(),
            "train_loss": loss,
            "train_accuracy": accuracy,
            "eval_loss": None if evaluation is None else evaluation.loss,
            "eval_accuracy": None if evaluation is None else evaluation.accuracy,
            **self._adversarial_gain(),
            **spent_on(spent, self._sum.examples),
        }

    def _last_setting(self) -> dict[str, float]:
        """Return what the latest optimization batch of the epoch was trained under."""
        decision = self._decision
        if decision is None:  # of an epoch that was begun before an interruption
            return dict(self._setting)
        return {
            "batch_size": decision.batch_size,
            "lr": self._rate,
            "lr_factor": decision.lr_factor,
            "adversarial_share": self._share,
        }

    def _adversarial_gain(self) -> dict[str, float]:
        """Return by how much the twins' mean loss exceeds that of the clean rows: below 0 they are
        too stale to be harder."""
        if not self._with_twins:
            return {}
        return {"adversarial_gain": self._gain.item() / self._with_twins}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, for a checkpoint in the middle of an epoch."""
        self._judge()
        correct = torch.zeros((), dtype=torch.int64, device=self._device)
        counted: Weight = 0
        if self._sum.hits is not None:
            correct, counted = self._sum.hits
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
        """Continue from :meth:`state_dict`."""
        rows = state["trained"]
        hits = None
        if rows > 0 and state["classified"]:
            counted = state.get("counted", rows)  # earlier versions count examples, nothing else
            hits = Hits(state["correct"].to(self._device), float(counted))
        self._sum = StepResult(
            state["loss"].to(self._device),
            float(state.get("weight", rows)),
            hits,
            rows,
            state["examples"],
        )
        self._gain = state["gain"].to(self._device)
        self._with_twins = state["with_twins"]
        self._setting = dict(state["setting"])
        self._decision = None
        self._seconds = dict(state["seconds"])
        self.forget_divergence()
        # states of earlier versions hold a limit, and the means begin anew
        if "explosion" in state:
            self._rule.load_state_dict(state["explosion"])
