"""The batch as large as the loss makes it useful and the curvature makes its learning rate stable.

Ours. A schedule gives the rate r of the first batch size B0. Batch and rate grow together, B = k B0
at rate k r. That changes neither the noise of the steps, which follows rate over batch, nor the
distance travelled per epoch, as long as k stays below two bounds, each measured once per epoch.

1. Useful. The critical batch size, beyond which more examples a step help little, grows as the loss
   L falls, as a power of it: B* / L^(1 / 0.21) (Kaplan et al., "Scaling laws for neural language
   models", arXiv:2001.08361, section 5.1; that it depends on the loss: McCandlish et al.,
   arXiv:1812.06162). B0 being right for the first epoch, of mean training loss L1,

       k <= (L1 / L)^loss_power.

   A mean is the loss of the middle of its epoch, and the decision falls at the end: L is the latest
   mean, carried on by half of its change from the lowest before, L_e (L_e / min(L_1 ...
   L_(e-1)))^(1/2). Only ratios of losses enter, so no B* has to be known. Growing too early slows
   the loss down, and with it the growth.

2. Stable. With momentum m and leading Hessian eigenvalue lambda, a quadratic is stable up to the
   rate 2 (1 + m) / lambda. With u the share of that rate in use, the stationary variance of
   momentum SGD along the leading direction is 1 / (1 - u) times that of the limit of small rates.
   So, to keep it below 1 / (1 - edge_share),

       k <= edge_share * 2 (1 + m) / (r lambda).

The two bind different things: the rate must be stable, the batch useful. So where the loss makes a
larger batch useful than the curvature lets the rate follow, k_useful > k_stable, the rate stays at
k_stable r and the batch grows on alone, part of the way in logarithms,

    B = B0 k_stable (k_useful / k_stable)^excess_power.

Its steps have less noise, and an epoch of them covers less distance, as under a lower rate, with
fewer updates; how near the edge the rate is does not change.

Both bounds are read off the path of the smaller batch: one growth is at most `max_growth`, then
both are read again. A schedule that lowers r raises the second bound: growth instead of decay
follows without a rule of its own. Neither batch nor factor of the rate ever shrinks: where the
eigenvalue has risen so that the factor in force is above k_stable, it stands in for it in the
formula. And the factor moves only when the batch does, so from the cap on, where nothing is
measured any more, or less than `hysteresis` below it, the rate follows the schedule alone.

A schedule that raises r, as a warm-up does, lowers the bound again: nothing grows while the rate
still rises.

The eigenvalue must be that of the function being trained: with batch normalisation, measured in
batch statistics (`norm_mode="batch"`). Running statistics give values tens of times larger, which
say nothing of stability.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hessianflow.control.bounded import BoundedController
from hessianflow.control.checks import check_count, check_number, check_signals
from hessianflow.control.controller import ControllerState, Measured
from hessianflow.facts import RunFacts
from hessianflow.interfaces.control import CurvatureReading
from hessianflow.interfaces.errors import HessianFlowError

ROUNDING = 1e-9
"""Of a rate that was multiplied by a factor and divided by it again."""


@dataclass
class CriticalState(ControllerState):
    """Adds the first and lowest losses, the newest usable eigenvalues, oldest first, and the latest
    scheduled rate."""

    first_loss: float | None = None
    lowest_loss: float | None = None
    eigenvalues: list[float] = field(default_factory=list)
    rate: float | None = None


class CriticalBatch(BoundedController[CriticalState]):
    """Grow the batch to what the fall of the loss makes useful and the top eigenvalue leaves
    stable.

    Signals used, once per epoch, both supplied by the trainer:
        epoch_loss: mean training loss of the epoch.
        learning_rate: the rate in force.

    A reading that is missing, not finite, not positive or not converged is passed over, and the
    decision rests on the ones before. A loss that is not finite and positive allows no growth, and
    the second bound none under a scheduled rate that is not finite, is negative, or has risen since
    the update before.

    Args:
        batch_size: examples per step at the start; the learning rate belongs to this size.
        max_batch_size: the cap.
        momentum: of the optimizer, in [0, 1).
        loss_power: power of the loss that the useful batch follows (1 / 0.21, measured on language
            models by Kaplan et al.). None: the first bound is left out.
        edge_share: share of the stable rate to be used, in (0, 1) (ours: 0.75, noise along the
            leading direction at most fourfold; experiments/controllers has 0.5 and 0.95 beside it).
            None: the second bound is left out, and no eigenvalue asked for. The stable rate is that
            of SGD with momentum; an optimizer that rescales its gradients (LARS, Adam, LAMB) has
            another: leave it out there.
        excess_power: how far the batch outgrows a rate that stability holds back while the loss
            makes more useful, as a power of the ratio of the two bounds, in [0, 1] (ours: 1/4). 0:
            batch and rate grow alike.
        window: readings the median is taken over (ours: 3).
        hysteresis: a growth by less than this factor is not made (ours: 1.25).
        max_growth: the largest factor of one growth, at least `hysteresis` (ours: 2).

    Raises:
        HessianFlowError: an argument is out of its bounds, or both bounds are left out.
    """

    prefers: ClassVar[Mapping[str, str]] = {"schedule": "cooldown", "norm_mode": "batch"}

    follows_rule = True

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
        super().__init__(
            CriticalState(batch_size),
            max_batch_size,
            min_batch_size=None,
            hysteresis=hysteresis,
            lr_rule="linear",
            max_lr_factor=None,
        )
        if loss_power is None and edge_share is None:
            raise HessianFlowError(
                "loss_power and edge_share must not both be None: nothing would bound the growth"
            )
        self.momentum = check_number("momentum", momentum, low=0, high=1)
        self.loss_power = (
            None if loss_power is None else check_number("loss_power", loss_power, above=0)
        )
        self.edge_share = (
            None if edge_share is None else check_number("edge_share", edge_share, above=0, high=1)
        )
        if 1 in (momentum, edge_share):
            raise HessianFlowError(
                f"momentum and edge_share must be < 1, got {momentum!r} and {edge_share!r}"
            )
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
        """Return the momentum of the run's optimizer, and no edge where that is not SGD.

        The stable rate of the second bound is SGD's: of an optimizer that rescales its gradients it
        says nothing.
        """
        found: dict[str, Any] = {"momentum": run.momentum or 0.0}
        if run.optimizer != "sgd":
            found["edge_share"] = None
        return found

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
        """What the bounds in force are made of, while the batch can still grow; then nothing."""
        if self._state.batch_size == self.max_batch_size:
            return frozenset()
        loss = {"epoch_loss"} if self.loss_power is not None else set[str]()
        edge = {"eigenvalue", "learning_rate"} if self.edge_share is not None else set[str]()
        return frozenset(loss | edge)

    def forget_reference(self) -> None:
        """Eigenvalues of another loss say nothing about the stability of this one, nor do its means
        about the fall."""
        self._state.eigenvalues = []
        self._state.lowest_loss = None

    def _decide(self, measured: Measured, /) -> str:
        if not self.needs:
            return ""
        check_signals(self.needs - {"eigenvalue"}, measured.signals)
        state = self._state
        useful, why = math.inf, ""
        stable, why_stable = math.inf, ""
        if self.loss_power is not None:
            useful, why = self._useful(measured.signals["epoch_loss"], self.loss_power)
        if self.edge_share is not None:
            rate = measured.signals["learning_rate"] / state.lr_factor
            stable, why_stable = self._stable(measured.reading, rate, self.edge_share)
        factor = rate_factor = min(useful, stable)
        if stable <= useful:
            why = why_stable
            if stable > 0 and useful < math.inf:
                # The rate in force may be beyond what is stable by now; it does not fall, and the
                # batch counts from it.
                rate_factor = max(stable, state.lr_factor)
                factor = rate_factor * max(useful / rate_factor, 1.0) ** self.excess_power
                why += f", the loss makes {useful:.4g} times the batch useful"
        return self._grow(factor, rate_factor, why)

    def _grow(self, factor: float, rate_factor: float, why: str) -> str:
        """To `factor` times the first batch at `rate_factor` times the rate, as far as one growth
        goes."""
        state, size, before = self._state, self._state.batch_size, self._state.lr_factor
        target = min(factor * self.initial_batch_size, self.max_growth * size)
        reason = self._move_to(target, why) if target > size else ""
        if state.batch_size > size:
            # Where the batch had outgrown it, the rate comes back in growths as small as the
            # batch's.
            state.lr_factor = min(rate_factor, self.max_growth * before, state.lr_factor)
        return reason

    def _useful(self, loss: float, power: float) -> tuple[float, str]:
        """Return the first bound, and what it rests on."""
        state = self._state
        if not 0 < loss < math.inf:
            return 0.0, f"loss {loss} is not positive and finite"
        first = state.first_loss = loss if state.first_loss is None else state.first_loss
        lowest = state.lowest_loss or loss
        state.lowest_loss = min(lowest, loss)
        # Differences of logarithms, as ratios of losses may overflow.
        now = math.log(loss) + (math.log(loss) - math.log(lowest)) / 2
        factor = math.exp(min(power * (math.log(first) - now), math.log(2) * 64))
        return (
            factor,
            f"loss fell from {first:.4g} to {math.exp(min(now, 700.0)):.4g} at the epoch's end",
        )

    def _stable(
        self, reading: CurvatureReading | None, rate: float, share: float
    ) -> tuple[float, str]:
        """Return the second bound for the scheduled `rate`, and what it rests on."""
        state = self._state
        if reading is not None and _is_usable(reading):
            state.eigenvalues = [*state.eigenvalues, reading.eigenvalue][-self.window :]
        if not 0 <= rate < math.inf:
            return 0.0, f"rate {rate} is negative or not finite"
        before, state.rate = state.rate, rate
        if rate == 0:
            return math.inf, "the schedule's rate is 0"
        if before is not None and rate > before * (1 + ROUNDING):
            return 0.0, f"the schedule's rate rose from {before:.4g} to {rate:.4g}"
        if not state.eigenvalues:
            return 0.0, "no usable eigenvalue"
        eigenvalue = statistics.median(state.eigenvalues)
        edge = 2 * (1 + self.momentum) / eigenvalue
        of = f" (median of {len(state.eigenvalues)})" if len(state.eigenvalues) > 1 else ""
        return (
            share * edge / rate,
            f"eigenvalue {eigenvalue:.4g}{of} is stable up to a rate of {edge:.4g}",
        )


def _is_usable(reading: CurvatureReading) -> bool:
    return reading.converged and reading.reliable and 0 < reading.eigenvalue < math.inf
