"""Accuracy under attack, with confidence intervals, and the alarm for catastrophic overfitting.

Intervals are Wilson's (1927). For k of n correct and z the normal quantile they are

    (k + z^2 / 2 +- z sqrt(k (n - k) / n + z^2 / 4)) / (n + z^2).

Unlike the textbook interval, they stay inside [0, 1] and are not empty at 0 or 100 %.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from hessianflow.adversarial.budget import check_one_tensor
from hessianflow.batches import as_batches, as_pair, to_device
from hessianflow.checks import is_number
from hessianflow.interfaces import Batch, HessianFlowError
from hessianflow.measuring import measuring

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Function of model, inputs and targets that returns perturbed inputs, such as
`functools.partial(pgd, eps=8 / 255, value_range=(0, 1))`."""


@dataclass(frozen=True)
class RobustAccuracy:
    """The share of examples classified correctly under one attack.

    Attributes:
        correct: Examples classified correctly.
        total: Examples seen.
        low: Lower end of the confidence interval.
        high: Upper end of the confidence interval.
    """

    correct: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """Return the accuracy, which is correct / total."""
        return self.correct / self.total


def robust_accuracy(
    model: nn.Module,
    data: Batch | Iterable[Batch],
    attacks: Mapping[str, Attack],
    *,
    confidence: float = 0.95,
) -> dict[str, RobustAccuracy]:
    """Measure accuracy on clean inputs, under each attack, and under the worst for each example.

    The model is in evaluation mode throughout, and left unchanged.

    Args:
        model: Classifier with outputs of shape [N, classes].
        data: One (inputs, targets) pair or an iterable of pairs. Targets are class numbers, shape
            [N].
        attacks: Attacks by name.
        confidence: Confidence level of the intervals.

    Returns:
        Accuracies by name: "clean", every attack, and, with more than one attack, "worst" for the
            examples that are correct when clean and under all attacks.

    Raises:
        HessianFlowError: There is no example, a batch is not a pair, targets are not one tensor, an
            attack has the name "clean" or "worst", or the confidence is outside (0, 1).
    """
    taken = {"clean", "worst"} & set(attacks)
    if taken:
        raise HessianFlowError(
            f"attacks must not be called {sorted(taken)[0]!r}: that name is used for the result"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    named: dict[str, Attack] = {"clean": lambda _model, x, _y: x, **attacks}
    names = list(named)
    if len(attacks) > 1:
        names.append("worst")
    correct = torch.zeros(len(names), dtype=torch.int64, device=device)
    total = 0
    for batch in as_batches(data):
        x, y = as_pair(to_device(batch, device))
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
    """Return Wilson's score interval of a share.

    Raises:
        HessianFlowError: total < 1, correct is outside 0..total, or confidence is outside (0, 1).
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
    low = (centre - spread) / (total + z * z)
    high = (centre + spread) / (total + z * z)
    # The ends at 0 and n correct are exactly 0 and 1, which rounding would miss.
    if correct == 0:
        low = 0.0
    if correct == total:
        high = 1.0
    return low, high


class OverfittingAlarm:
    """Detect catastrophic overfitting, where accuracy under PGD collapses and under FGSM does not.

    Wong, Rice, Kolter (arXiv 2001.03994) observe PGD accuracy during training. The rule is our
    choice: the alarm is raised when PGD accuracy is below `collapse` times its best so far and FGSM
    accuracy is not below its value then. It is raised again only after PGD accuracy has recovered.

    Args:
        collapse: Share of the best PGD accuracy below which it counts as collapsed.

    Raises:
        HessianFlowError: collapse is outside (0, 1).
    """

    def __init__(self, collapse: float = 0.5) -> None:
        if not is_number(collapse) or not 0 < collapse < 1:
            raise HessianFlowError(f"collapse must lie between 0 and 1, got {collapse}")
        self._collapse = collapse
        self._best_pgd = self._fgsm_then = 0.0
        self._raised = False

    def update(self, fgsm: float, pgd: float) -> str:
        """Take the accuracies of one evaluation and return the reason of an alarm, or nothing."""
        if pgd > self._best_pgd:
            self._best_pgd = pgd
            self._fgsm_then = fgsm
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
        """Continue from what :meth:`state_dict` returned."""
        self._best_pgd = float(state["best_pgd"])
        self._fgsm_then = float(state["fgsm_then"])
        self._raised = bool(state["raised"])


def _hits(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with measuring(model) as inner, torch.no_grad():
        predicted: Tensor = inner(x).argmax(1)
        return predicted == y
