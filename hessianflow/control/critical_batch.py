"""A batch as large as the loss makes useful, while the curvature keeps its learning rate stable.

This method is our own. A schedule gives the rate r of the first batch size B0. Batch and rate grow
together, to B = k B0 at rate k r. That changes neither the noise of the steps, which follows rate
over batch, nor the distance travelled per epoch, as long as k stays below two bounds. Each bound is
measured once per epoch.

1. Useful. More examples per step help little beyond the critical batch size, which grows with a
   power of the loss L as L falls: B* / L^(1 / 0.21) (Kaplan et al., "Scaling laws for neural
   language models", arXiv:2001.08361, section 5.1; McCandlish et al., arXiv:1812.06162, found that
   it depends on the loss). If B0 is right for the first epoch, whose mean training loss is L1,

       k <= (L1 / L)^loss_power.

   The mean of an epoch is the loss at its middle, but the decision is made at its end. So L is the
   latest mean, extrapolated by half of its change from the lowest mean before it:
   L_e (L_e / min(L_1 ... L_(e-1)))^(1/2). Only ratios of losses enter, so B* need not be known. A
   growth that comes too early slows the fall of the loss, and with it the next growth.

2. Stable. With momentum m and leading Hessian eigenvalue lambda, a quadratic is stable up to the
   rate 2 (1 + m) / lambda. A probe that knows the optimizer gives threshold / sharpness in its
   place: the same for SGD, and what holds under Nesterov momentum, dampening, decay or a
   preconditioner (curvature/geometry.py). With u the share of that rate in use, the stationary
   variance of momentum SGD along the leading direction is 1 / (1 - u) times its limit for small
   rates. To keep that factor below 1 / (1 - edge_share),

       k <= edge_share * 2 (1 + m) / (r lambda).

The first bound limits the batch and the second limits the rate. Where the loss makes a larger batch
useful than the curvature lets the rate follow, k_useful > k_stable, the rate stays at k_stable r
and the batch alone grows further, by a part of the remaining ratio:

    B = B0 k_stable (k_useful / k_stable)^excess_power.

The steps of such a batch have less noise, and its epochs cover less distance, as they would under a
lower rate, but with fewer updates. The distance of the rate from the edge does not change.

Both bounds are measured on the path of the smaller batch, so one growth is at most `max_growth`,
after which both are measured again. A schedule that lowers r raises the second bound, so that
growth instead of decay follows without a rule of its own. Neither the batch nor the factor of the
rate ever shrinks: where the eigenvalue has risen so far that the factor in force exceeds k_stable,
that factor takes the place of k_stable in the formula. The factor moves only when the batch does.
So at the cap, where nothing is measured any more, or within `hysteresis` below it, the rate follows
the schedule alone. A schedule that raises r, as a warm-up does, lowers the second bound again, so
nothing grows while the rate still rises.

The eigenvalue must be that of the function being trained. With batch normalisation it is measured
in batch statistics (`norm_mode="batch"`), because running statistics give values tens of times
larger, which say nothing about stability.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hessianflow.checks import check_count, check_number
from hessianflow.control.bounded import BoundedController
from hessianflow.control.checks import check_optional_number, require_signals
from hessianflow.control.controller import ControllerState, Measured
from hessianflow.facts import RunFacts
from hessianflow.interfaces.control import CurvatureReading
from hessianflow.interfaces.errors import HessianFlowError

ROUNDING = 1e-9
"""Relative error of a rate that was multiplied by a factor and divided by it again."""


@dataclass
class CriticalState(ControllerState):
    """Adds the first and lowest loss, the latest usable eigenvalues, and the scheduled rate."""

    first_loss: float | None = None
    lowest_loss: float | None = None
    eigenvalues: list[float] = field(default_factory=list)
    rate: float | None = None


class CriticalBatch(BoundedController[CriticalState]):
    """Grow the batch as far as the fall of the loss makes useful and the top eigenvalue stable.

    Once per epoch it uses these signals of the trainer:
        epoch_loss: Mean training loss of the epoch.
        learning_rate: Rate in force.

    A reading that is missing, not finite, not positive or not converged is skipped, and the
    decision rests on earlier ones. A loss that is not finite and positive allows no growth. Nor
    does the second bound under a scheduled rate that is not finite, is negative, or has risen since
    the previous update.

    Args:
        batch_size: Examples per step at the start. The learning rate is stated for this size.
        max_batch_size: Largest examples per step.
        momentum: Momentum of the optimizer, in [0, 1).
        loss_power: Power of the loss by which the useful batch grows (1 / 0.21, as Kaplan et al.
            measured on language models); null drops this bound.
        edge_share: Share of the stable learning rate that may be used, in (0, 1); null drops this
            bound, and no eigenvalue is measured. The default is our choice: it lets the noise along
            the leading direction grow at most fourfold (experiments/controllers also has 0.5 and
            0.95). Where the probe does not know the optimizer, the stable rate is that of SGD with
            momentum: drop the bound then for one that rescales its gradients (LARS, Adam, LAMB).
        excess_power: Power of the ratio of the two bounds by which the batch outgrows a rate that
            stability holds back, in [0, 1]. With 0, batch and rate grow alike. The default is our
            choice.
        window: Latest eigenvalues of which the median is taken. This default is our choice.
        hysteresis: Smallest factor by which the batch grows. This default is our choice.
        max_growth: Largest factor of one growth, at least `hysteresis`. This default is our choice.
    """

    prefers: ClassVar[Mapping[str, str]] = {"schedule": "cooldown", "norm_mode": "batch"}

    def __init__(
        self,
        batch_size: int,
        max_batch_size: int,
        *,
        momentum: float = 0.9,
        loss_power: float | None = 1 / 0.21,
        edge_share: float | None = 0.75,
        excess_power: float = 1 / 4,
        window: int = 3,
        hysteresis: float = 1.25,
        max_growth: float = 2,
    ) -> None:
        super().__init__(CriticalState(batch_size), max_batch_size, hysteresis=hysteresis)
        if loss_power is None and edge_share is None:
            raise HessianFlowError(
                "loss_power and edge_share must not both be None: nothing would bound the growth"
            )
        self.momentum = check_number("momentum", momentum, low=0, high=1)
        self.loss_power = check_optional_number("loss_power", loss_power, above=0)
        self.edge_share = check_optional_number("edge_share", edge_share, above=0, high=1)
        if 1 in (momentum, edge_share):
            raise HessianFlowError(
                f"momentum and edge_share must be < 1, got {momentum!r} and {edge_share!r}"
            )
        # The second bound finds the rate itself; without it, the rate follows the batch by a rule.
        self.follows_rule = edge_share is None
        self.excess_power = check_number("excess_power", excess_power, low=0, high=1)
        self.window = check_count("window", window)
        self.max_growth = check_number("max_growth", max_growth, above=1)
        if max_growth < hysteresis:
            raise HessianFlowError(
                f"max_growth must be >= hysteresis {hysteresis!r}, got {max_growth!r}: the batch"
                " could never grow"
            )

    @classmethod
    def defaults(cls, run: RunFacts, _options: Mapping[str, Any], /) -> dict[str, Any]:
        """Return the momentum of the run's optimizer, and no second bound unless that is SGD.

        The stable rate of that bound says nothing about an optimizer that rescales its gradients.
        """
        options: dict[str, Any] = {}
        if run.momentum is not None:
            options["momentum"] = run.momentum
        if run.optimizer != "sgd":
            options["edge_share"] = None
        return options

    @classmethod
    def refuses(cls, run: RunFacts, options: Mapping[str, Any], /) -> str:
        """Return why the second bound does not go with a run."""
        if options.get("edge_share") is None:
            return ""
        way_out = "leave it out, or switch that bound off with --controller.edge-share null"
        if run.norm_mode == "eval":
            return (
                "--norm-mode eval measures another function than the one trained, whose edge is"
                f" sought: {way_out}"
            )
        if run.lr_rule is not None:
            return f"--lr-rule {run.lr_rule} would replace the rate that is found stable: {way_out}"
        return ""

    @property
    def needs(self) -> frozenset[str]:
        """Name the signals of the bounds in force while the batch can still grow, then nothing."""
        if self._state.batch_size == self.max_batch_size:
            return frozenset()
        names = set()
        if self.loss_power is not None:
            names.add("epoch_loss")
        if self.edge_share is not None:
            names |= {"eigenvalue", "learning_rate"}
        return frozenset(names)

    def forget_reference(self) -> None:
        """Forget the eigenvalues and the lowest loss, which say nothing about another loss."""
        self._state.eigenvalues = []
        self._state.lowest_loss = None

    def _decide(self, measured: Measured, /) -> str:
        if not self.needs:
            return ""
        require_signals(self.needs - {"eigenvalue"}, measured.signals)
        useful, why = self._useful(measured.signals)
        stable, why_stable = self._stable(measured)
        if useful < stable:
            return self._grow(useful, useful, why)
        if stable <= 0 or useful == math.inf:
            return self._grow(stable, stable, why_stable)
        # The rate in force may by now exceed the stable one. It does not fall, and the batch grows
        # beyond it.
        rate_factor = max(stable, self._state.lr_factor)
        factor = rate_factor * max(useful / rate_factor, 1.0) ** self.excess_power
        why = f"{why_stable}, the loss makes {useful:.4g} times the batch useful"
        return self._grow(factor, rate_factor, why)

    def _grow(self, factor: float, rate_factor: float, why: str) -> str:
        """Grow towards `factor` times the first batch and `rate_factor` times the rate."""
        state = self._state
        size = state.batch_size
        rate_before = state.lr_factor
        target = min(factor * self.initial_batch_size, self.max_growth * size)
        if target <= size:
            return ""
        reason = self._move_to(target, why)
        if state.batch_size > size:
            # Where the batch had outgrown the rate, the rate catches up in growths as small as
            # those of the batch.
            state.lr_factor = min(rate_factor, self.max_growth * rate_before, state.lr_factor)
        return reason

    def _useful(self, signals: Mapping[str, float]) -> tuple[float, str]:
        """Return the first bound and its grounds."""
        if self.loss_power is None:
            return math.inf, ""
        state = self._state
        loss = signals["epoch_loss"]
        if not 0 < loss < math.inf:
            return 0.0, f"loss {loss} is not positive and finite"
        first = state.first_loss = state.first_loss or loss
        lowest = state.lowest_loss or loss
        state.lowest_loss = min(lowest, loss)
        # Differences of logarithms, because ratios of losses may overflow.
        now = math.log(loss) + (math.log(loss) - math.log(lowest)) / 2
        factor = math.exp(min(self.loss_power * (math.log(first) - now), math.log(2) * 64))
        end = math.exp(min(now, 700.0))
        return factor, f"loss fell from {first:.4g} to {end:.4g} at the epoch's end"

    def _stable(self, measured: Measured) -> tuple[float, str]:
        """Return the second bound and its grounds."""
        if self.edge_share is None:
            return math.inf, ""
        state = self._state
        rate = measured.signals["learning_rate"] / state.lr_factor
        reading = measured.reading
        if reading is not None and _is_usable(reading):
            state.eigenvalues = [*state.eigenvalues, self._eigenvalue(reading)][-self.window :]
        if not 0 <= rate < math.inf:
            return 0.0, f"rate {rate} is negative or not finite"
        before = state.rate
        state.rate = rate
        if rate == 0:
            return math.inf, "the schedule's rate is 0"
        if before is not None and rate > before * (1 + ROUNDING):
            return 0.0, f"the schedule's rate rose from {before:.4g} to {rate:.4g}"
        if not state.eigenvalues:
            return 0.0, "no usable eigenvalue"
        eigenvalue = statistics.median(state.eigenvalues)
        edge = 2 * (1 + self.momentum) / eigenvalue
        shown = f"{eigenvalue:.4g}"
        if len(state.eigenvalues) > 1:
            shown += f" (median of {len(state.eigenvalues)})"
        bound = self.edge_share * edge / rate
        return bound, f"eigenvalue {shown} is stable up to a rate of {edge:.4g}"

    def _eigenvalue(self, reading: CurvatureReading) -> float:
        """Return the eigenvalue under which SGD with the momentum has the edge of the reading."""
        edge = 2 * (1 + self.momentum)
        return _sharpness(reading) * (edge / reading.details.get("threshold", edge))


def _sharpness(reading: CurvatureReading) -> float:
    return reading.details.get("sharpness", reading.eigenvalue)


def _is_usable(reading: CurvatureReading) -> bool:
    return reading.converged and reading.reliable and 0 < _sharpness(reading) < math.inf
