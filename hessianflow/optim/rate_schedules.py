"""Learning-rate schedules by name: the factor of the rate after a number of epochs.

Each is a function of the epochs done, fractions included, from 1 at the start of a run; warm-up is
the run's own affair. They differ from those of torch in that they are stated in epochs, so that
they keep their meaning when the batch grows.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from hessianflow.checks import check_number
from hessianflow.facts import RunFacts
from hessianflow.interfaces import HessianFlowError
from hessianflow.optim.schedules import cooldown


class Constant:
    """The rate stays as it is."""

    def __call__(self, epoch: float, /) -> float:
        """Return 1, whatever the time."""
        del epoch
        return 1.0


class MultiStep:
    """The rate is multiplied by a factor at each milestone.

    Args:
        milestones: epochs done at which the rate is multiplied, increasing, e.g. "[30, 60]"; the
            command takes those of the data set.
        lr_decay: the factor (0.2 in the published ABSA runs).

    Raises:
        HessianFlowError: milestones that do not increase, or a negative factor.
    """

    def __init__(self, *, milestones: Sequence[int], lr_decay: float = 0.2) -> None:
        for epoch in milestones:
            check_number("milestones", epoch)
        self.milestones = tuple(milestones)
        if any(later <= earlier for earlier, later in pairwise(self.milestones)):
            raise HessianFlowError(
                f"milestones must be increasing epochs, got {list(self.milestones)}"
            )
        check_number("lr_decay", lr_decay)
        if lr_decay > 1:
            raise HessianFlowError(f"lr_decay must be at most 1, got {lr_decay:g}: a rate decays")
        self.lr_decay = lr_decay

    @classmethod
    def defaults(cls, run: RunFacts, _options: Mapping[str, Any], /) -> dict[str, Any]:
        """Return the data set's milestones, at their places in a run."""
        return {"milestones": run.milestones}

    def __call__(self, epoch: float, /) -> float:
        """Return the factor of the milestones passed."""
        return float(self.lr_decay ** sum(epoch >= milestone for milestone in self.milestones))


class Cosine:
    """The rate falls to 0 along half a cosine (Loshchilov and Hutter, arXiv:1608.03983, without
    restarts).

    Args:
        epochs: length of the run.

    Raises:
        HessianFlowError: the run has no epoch.
    """

    def __init__(self, epochs: int) -> None:
        check_number("epochs", epochs, low=1)
        self.epochs = epochs

    def __call__(self, epoch: float, /) -> float:
        """Return (1 + cos(pi t)) / 2 at the share t of the run."""
        return 0.5 * (1 + math.cos(math.pi * min(epoch / self.epochs, 1)))


class Polynomial:
    """The rate falls to 0 as a power of what is left of the run.

    Args:
        epochs: length of the run.
        power: the power (2 in the LARS paper, arXiv:1708.03888, section 6).

    Raises:
        HessianFlowError: the run has no epoch, or the power is negative.
    """

    def __init__(self, epochs: int, *, power: float = 2.0) -> None:
        check_number("epochs", epochs, low=1)
        self.epochs = epochs
        check_number("power", power)
        self.power = power

    def __call__(self, epoch: float, /) -> float:
        """Return (1 - t)^power at the share t of the run."""
        return float(max(1 - epoch / self.epochs, 0.0) ** self.power)


class Cooldown:
    """The rate is constant, and then falls linearly to 0 (Haegele et al., "Scaling laws and
    compute-optimal training beyond fixed training durations", arXiv:2405.18392).

    Args:
        epochs: length of the run.
        decay_from: epochs done from which it falls; the command takes two thirds of the run,
            rounded down, but early enough to lower the last epoch's rate.

    Raises:
        HessianFlowError: the run has no epoch, or `decay_from` is not below its length.
    """

    def __init__(self, epochs: int, *, decay_from: float) -> None:
        if decay_from >= epochs:
            raise HessianFlowError(
                f"decay_from must lie below the {epochs} epochs of the run, got {decay_from:g}"
            )
        self._factor = cooldown(epochs, decay_from)

    @classmethod
    def defaults(cls, run: RunFacts, _options: Mapping[str, Any], /) -> dict[str, Any]:
        """Return two thirds of a run."""
        return {"decay_from": cooldown_start(run.epochs)}

    def __call__(self, epoch: float, /) -> float:
        """Return 1, or what is left of the way from `decay_from` to the end."""
        return self._factor(epoch)


def cooldown_start(epochs: int) -> int:
    """Return the number of epochs after which a cooldown begins by default."""
    return max(0, min(epochs * 2 // 3, epochs - 2))
