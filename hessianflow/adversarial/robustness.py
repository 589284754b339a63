"""Accuracy under attack, with confidence intervals, and the alarm for catastrophic overfitting.

Intervals are Wilson's (1927): for k of n correct and z the normal quantile, (k + z^2/2 +- z sqrt(k
(n - k) / n + z^2 / 4)) / (n + z^2); unlike the textbook interval it stays inside [0, 1] and is not
empty at 0 or 100 %.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from hessianflow.adversarial.budget import check_one_tensor
from hessianflow.batches import as_batches, as_pair, move
from hessianflow.checks import is_number
from hessianflow.interfaces import Batch, HessianFlowError
from hessianflow.measuring import measuring

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""attack(model, inputs, targets) -> perturbed inputs: `functools.partial(pgd, eps=8 / 255,
value_range=(0, 1))`."""


@dataclass(frozen=True)
class RobustAccuracy:
    """Share of examples classified correctly under one attack.

    Attributes:
        correct: examples classified correctly.
        total: examples seen.
        low: lower end of the confidence interval.
        high: upper end of the confidence interval.
    """

    correct: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """correct / total."""
        return self.correct / self.total


def robust_accuracy(
    model: nn.Module,
    data: Batch | Iterable[Batch],
    attacks: Mapping[str, Attack],
    *,
    confidence: float = 0.95,
) -> dict[str, RobustAccuracy]:
    """Accuracy on clean inputs, under each attack, and under the worst of them for each example.

    Evaluation mode throughout; the model is left as found.

    Args:
        model: classifier; outputs of shape [N, classes].
        data: one (inputs, targets) pair or an iterable of pairs; targets are class numbers, shape
            [N].
        attacks: by name.
        confidence: of the intervals.

    Returns:
        "clean", every name given, and, with more than one attack, "worst": correct under all
            attacks and clean.

    Raises:
        HessianFlowError: no example; batches that are no pairs, or targets that are not one tensor;
            a name that is taken; a confidence outside (0, 1).
    """
    taken = {"clean", "worst"} & set(attacks)
    if taken:
        raise HessianFlowError(
            f"attacks must not be called {sorted(taken)[0]!r}: that name is used for the result"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    named: dict[str, Attack] = {"clean": lambda _model, x, _y: x, **attacks}
    names = [*named, "worst"] if len(attacks) > 1 else [*named]
    correct = torch.zeros(len(names), dtype=torch.int64, device=device)
    total = 0
    for batch in as_batches(data):
        x, y = as_pair(move(batch, device))
        check_one_tensor(y, "targets", "of class numbers")
        hits = torch.stack([_hits(model, attack(model, x, y), y) for attack in named.values()])
        if len(attacks) > 1:
            hits = torch.cat([hits, hits.all(0, keepdim=True)])
        correct += hits.sum(1)
        total += len(y)
    counts = [int(k) for k in correct.tolist()]
    intervals = [wilson_interval(k, total, confidence) for k in counts]
    return {
        name: RobustAccuracy(k, total, *ends)
        for name, k, ends in zip(names, counts, intervals, strict=True)
    }


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share.

    Raises:
        HessianFlowError: total < 1, correct outside 0..total, or a confidence outside (0, 1).
    """
    if total < 1 or not 0 <= correct <= total:
        raise HessianFlowError(
            f"correct must lie between 0 and total >= 1, got {correct} of {total}: is the data"
            " empty?"
        )
    if not 0 < confidence < 1:
        raise HessianFlowError(f"confidence must lie between 0 and 1, got {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = correct + z * z / 2
    spread = z * math.sqrt(correct * (total - correct) / total + z * z / 4)
    # The ends at 0 and n correct are exactly 0 and 1; rounding would miss them.
    low = 0.0 if correct == 0 else (centre - spread) / (total + z * z)
    return low, 1.0 if correct == total else (centre + spread) / (total + z * z)


class OverfittingAlarm:
    """Tells when FGSM training overfits catastrophically: accuracy under FGSM up while that under
    PGD collapses.

    Wong, Rice, Kolter (arXiv 2001.03994) watch PGD accuracy during training; the rule is ours: an
    alarm when PGD accuracy is below `collapse` times its best so far and FGSM accuracy is not below
    what it was then. Once raised, it is raised again only after PGD accuracy has recovered.

    Args:
        collapse: share of the best PGD accuracy that counts as collapsed.

    Raises:
        HessianFlowError: collapse outside (0, 1).
    """

    def __init__(self, collapse: float = 0.5) -> None:
        if not is_number(collapse) or not 0 < collapse < 1:
            raise HessianFlowError(f"collapse must lie between 0 and 1, got {collapse}")
        self._collapse = collapse
        self._best_pgd = self._fgsm_then = 0.0
        self._raised = False

    def update(self, fgsm: float, pgd: float) -> str:
        """Feed the accuracies of one evaluation; returns why the alarm is raised, or an empty
        string."""
        if pgd > self._best_pgd:
            self._best_pgd, self._fgsm_then = pgd, fgsm
        collapsed = pgd < self._collapse * self._best_pgd and fgsm >= self._fgsm_then
        news = collapsed and not self._raised
        self._raised = collapsed
        if not news:
            return ""
        return (
            f"catastrophic overfitting: accuracy under PGD fell from {self._best_pgd:.1%} to"
            f" {pgd:.1%} while that under FGSM went from {self._fgsm_then:.1%} to {fgsm:.1%}; use a"
            " random start, a smaller eps, or PGD"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the best evaluation so far and whether the alarm is on."""
        return {"best_pgd": self._best_pgd, "fgsm_then": self._fgsm_then, "raised": self._raised}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._best_pgd, self._fgsm_then = float(state["best_pgd"]), float(state["fgsm_then"])
        self._raised = bool(state["raised"])


def _hits(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with measuring(model) as inner, torch.no_grad():
        predicted: Tensor = inner(x).argmax(1)
        return predicted == y
