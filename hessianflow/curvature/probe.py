"""The leading eigenvalue during training: small, repeatable, warm-started, and free of side
effects.

Each call measures the Hessian of the mean loss over the probe batch at the current weights. The
start vector is a sum: the last call's leading vector, its other Ritz vectors weighted by
RUNNER_UP_WEIGHT, DIRECTION_WEIGHT times the direction in which that search would have gone on, and
a random part (RANDOM_SHARE in eigenpairs.py). From the old leading vector alone, an iteration
settles with a small residual on what may by now be the second eigenvalue, 4-8 % too low. The sum
finds a new leading value whose vector is among the old Ritz vectors, unless it was far below the
leading one: after few products such a vector is still rough (WARM in evidence.py has the count). A
new leading value outside the Ritz vectors grows in the direction from call to call, as in one
longer search.
In experiments/benchmarks/warm_start.py, values 20 to 100 % above the old one were found in the
fourth call at the latest, and one 5 % above it in the fifth. Few products cannot do better, so a
single warm reading may miss the leading value; every `cold_every`-th call starts at random.

Choices of ours: the batch of 64 to 128 examples is fixed by default, because batches differ by 8 to
10 %. Readings that are not finite, not converged or not reliable are returned as such and never
enter the smoothed value; the first two kinds do not enter the next start either.
"""

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from hessianflow.batches import num_examples
from hessianflow.curvature.checks import check_count, check_search
from hessianflow.curvature.eigenpairs import top_eigenpairs
from hessianflow.curvature.hessian import HessianOperator
from hessianflow.curvature.measurable import check_options
from hessianflow.curvature.operator import NonFiniteError
from hessianflow.curvature.results import EigenResult, Which
from hessianflow.curvature.selection import Selection, listed
from hessianflow.curvature.vectors import normalised
from hessianflow.interfaces import (
    CurvatureReading,
    HessianFlowError,
    LinearOperator,
    LossFn,
    NormMode,
)
from hessianflow.measuring import unwrap
from hessianflow.normalisation.statistics import is_unsettled

Smoothing = Literal["none", "median", "ema"]

GRADIENTS_PER_PRODUCT = 2.0
"""Cost of one product on a kept graph, in gradients of as many training examples. Measured: 1.8,
for ResNet-20 on a CPU with products of 64 examples and steps of 128 (1.3 to 1.7 in gradients of the
same batch in evaluation mode)."""

SPARE_VECTORS = 2
"""Ritz vectors remembered beyond the k tracked ones. Ours."""

RUNNER_UP_WEIGHT = 0.5
"""Weight of the other Ritz vectors in a warm start, each times the ratio of its value to the
leading one: a near value may soon lead, while a large part of a far one costs products. Ours;
experiments/benchmarks/warm_start.py compares it with equal weights."""

DIRECTION_WEIGHT = 0.3
"""Weight of the direction in which the last search would have gone on. Ours: a new leading value
outside the remembered vectors went unnoticed for up to ten calls without it, for one to three with
it."""


class ProbeOperator(LinearOperator, Protocol):
    """What a probe measures; made anew for each reading."""

    def release(self) -> None:
        """Free what is kept between products."""
        ...


class CurvatureProbe:
    """Measures the leading Hessian eigenvalues of a model, again and again, and leaves no trace on
    it.

    Args:
        model: the model; wrappers are looked through.
        loss_fn: loss_fn(outputs, targets), or loss_fn(model, batch) for a dict batch.
        batch: the probe batch: a pair (inputs, targets) or a dict, kept for all calls; or a
            function without arguments that returns a fresh one for each call. 64 to 128 examples
            are enough.
        k: eigenvalues to track.
        tol: allowed relative error of each. Default: the tolerance of ABSA's code.
        warm_start: start from the vectors of the last reading.
        cold_every: every `cold_every`-th call starts at random, whatever the last vectors; ours.
        which: "LM" largest magnitude, "LA" largest or "SA" smallest algebraic.
        params: parameters to differentiate by; see HessianOperator.
        norm_mode: batch-normalisation statistics, recorded with each reading.
        microbatch_size: examples per pass; bounds memory, at about 1.4x the time.
        max_matvecs: most products per call; a search that needs more returns converged=False.
        first_matvecs: most products of the first call, whose price is not known beforehand; None:
            `max_matvecs`; 0: :meth:`is_affordable` says no until a call has been made regardless.
        smoothing: adds `details["smoothed"]`: the median of the last `window` good readings, or an
            exponential moving average of all of them, which each enters with weight 2 / (window +
            1) and the first starts.
        window: see `smoothing`.
        budget: largest share of the training cost to be spent, for :meth:`is_affordable`; None: no
            limit.
        seed: of the random parts of all starts.
        check_product: compare a product of the first call with a difference of gradients; see
            HessianOperator.
        check_statistics: in norm_mode "eval", compare the loss of up to 32 examples under running
            statistics with that under their own, and say in `reliable` whether the former have
            settled (normalisation/statistics.py). False: say that they have, as the published code of ABSA
            takes for granted.
        operator: makes what is measured, called as HessianOperator is; on several ranks
            `hessianflow.distributed.sharded(world)`.

    Raises:
        HessianFlowError: an option out of range; at a call: what HessianOperator raises, except
            that weights or a loss that are not finite give a reading of nan.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batch: Any | Callable[[], Any],
        *,
        k: int = 1,
        tol: float = 1e-2,
        warm_start: bool = True,
        cold_every: int = 20,
        which: Which = "LM",
        params: Selection = None,
        norm_mode: NormMode = "eval",
        microbatch_size: int | None = None,
        max_matvecs: int = 100,
        first_matvecs: int | None = None,
        smoothing: Smoothing = "none",
        window: int = 5,
        budget: float | None = None,
        seed: int = 0,
        check_product: bool = True,
        check_statistics: bool = True,
        operator: Callable[..., ProbeOperator] = HessianOperator,
    ) -> None:
        if smoothing not in get_args(Smoothing):
            raise HessianFlowError(
                f"smoothing must be one of {', '.join(get_args(Smoothing))}, got {smoothing!r}"
            )
        check_search(k, which, tol, max_matvecs)
        check_options(unwrap(model), microbatch_size, norm_mode)
        check_count("cold_every", cold_every, remark=" (always cold)")
        check_count("window", window)
        if first_matvecs is not None and first_matvecs < 0:
            raise HessianFlowError(
                f"first_matvecs must be at least 0, got {first_matvecs}: None has no bound of"
                " its own"
            )
        if budget is not None and not budget > 0:
            raise HessianFlowError(
                f"budget must be a positive share of the training cost, e.g. 0.01, got {budget}"
            )
        self._model, self._loss_fn, self._batch = model, loss_fn, batch
        self._k, self._tol, self._which, self._max_matvecs = k, tol, which, max_matvecs
        self._warm_start, self._cold_every, self._seed = warm_start, cold_every, seed
        self._smoothing, self._window, self._budget = smoothing, window, budget
        self._params, self._norm_mode, self._microbatch_size = (
            listed(params),
            norm_mode,
            microbatch_size,
        )
        self._operator, self._check_product = operator, check_product
        self._first_matvecs, self._check_statistics = first_matvecs, check_statistics
        self._start: Tensor | None = None
        self._recent: list[float] = []
        self._average: float | None = None
        self._largest_loss = 0.0  # under the probe batch's own statistics
        self._calls, self._spent, self._last_cost = 0, 0.0, 0.0

    @property
    def model(self) -> nn.Module:
        """What is measured, as it was given."""
        return self._model

    def __call__(self) -> CurvatureReading:
        """Measure at the current weights."""
        began = time.perf_counter()
        batch = self._batch() if callable(self._batch) else self._batch
        examples = num_examples(batch)
        # A new operator each time: no graph and no batch outlives the call. The loss is checked to
        # repeat once.
        operator = self._operator(
            self._model,
            self._loss_fn,
            batch,
            params=self._params,
            microbatch_size=self._microbatch_size,
            norm_mode=self._norm_mode,
            check_deterministic=self._calls == 0,
            check_product=self._check_product and self._calls == 0,
        )
        unsettled = None
        try:
            result = self._measure(operator)
            unsettled = self._unsettled_losses(operator)
        except NonFiniteError:
            result = None
        finally:
            operator.release()
            self._calls += 1
        self._account(result, examples, unsettled is None)
        return self._reading(result, examples, time.perf_counter() - began, unsettled)

    def is_affordable(self, examples: int) -> bool:
        """Return whether the next call, at the price of the last, fits the budget after `examples`
        training examples.

        Cost is counted in gradients of one example, so the answer depends on no clock and repeats
        in a resumed run.
        """
        if self._calls == 0:
            return self._first_matvecs != 0
        if self._budget is None:
            return True
        return self._spent + self._last_cost <= self._budget * examples

    def state_dict(self) -> dict[str, Any]:
        """Return what the next reading depends on besides the model and the batch."""
        return {
            "calls": self._calls,
            "spent": self._spent,
            "last_cost": self._last_cost,
            "recent": list(self._recent),
            "average": self._average,
            "largest_loss": self._largest_loss,
            "start": None if self._start is None else self._start.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a probe of the same model and options stopped."""
        self._calls, self._spent, self._last_cost = (
            state["calls"],
            state["spent"],
            state["last_cost"],
        )
        self._recent, self._average = list(state["recent"]), state["average"]
        self._largest_loss = state["largest_loss"]
        self._start = None if state["start"] is None else state["start"].clone()

    def _measure(self, operator: LinearOperator) -> EigenResult:
        cold = self._calls % self._cold_every == 0
        start = None if cold else self._start
        most = self._max_matvecs
        if self._calls == 0 and self._first_matvecs:
            most = min(most, self._first_matvecs)
        return top_eigenpairs(
            operator,
            min(self._k, operator.size),
            which=self._which,
            tol=self._tol,
            max_matvecs=most,
            v0=start,
            seed=_mixed(self._seed, self._calls),
            extra=SPARE_VECTORS,
            warm=start is not None,
        )

    def _unsettled_losses(self, operator: ProbeOperator) -> tuple[float, float] | None:
        """Return the losses under running and own statistics if the former have not settled, else
        None."""
        ask = getattr(operator, "statistics_losses", None)  # of operators that run a model
        found = ask() if self._check_statistics and ask is not None else None
        if found is None:
            return None
        running, own, weight = found
        if weight == 0:
            return None
        self._largest_loss = (
            max(self._largest_loss, abs(own)) if math.isfinite(own) else self._largest_loss
        )
        return (running, own) if is_unsettled(running, own, self._largest_loss) else None

    def _account(self, result: EigenResult | None, examples: int, reliable: bool) -> None:
        products = 0 if result is None else result.matvecs
        self._last_cost = (1 + GRADIENTS_PER_PRODUCT * products) * examples
        self._spent += self._last_cost
        if result is None:
            self._start = None
        elif result.converged:
            self._start = remembered(result) if self._warm_start else None
        if result is not None and result.converged and reliable:
            value = float(result.values[0])
            self._recent = [*self._recent, value][-self._window :]
            self._average = _averaged(self._average, value, self._window)

    def _reading(
        self,
        result: EigenResult | None,
        examples: int,
        seconds: float,
        unsettled: tuple[float, float] | None,
    ) -> CurvatureReading:
        values = [] if result is None else result.values[: self._k].tolist()
        return CurvatureReading(
            eigenvalue=values[0] if values else math.nan,
            residual=math.nan if result is None else float(result.residuals[0]),
            matvecs=0 if result is None else result.matvecs,
            converged=result is not None and result.converged,
            eigenvalues=tuple(values) if self._k > 1 else (),
            norm_mode=self._norm_mode,
            num_examples=examples,
            seconds=seconds,
            details=self._details(unsettled),
            reliable=unsettled is None,
        )

    def _details(self, unsettled: tuple[float, float] | None) -> dict[str, float]:
        details: dict[str, float] = {}
        if unsettled is not None:
            details["running_loss"], details["own_loss"] = unsettled
        if self._smoothing != "none" and self._average is not None:
            details["smoothed"] = (
                self._average if self._smoothing == "ema" else statistics.median(self._recent)
            )
        return details


def by_value(nearness: Tensor) -> Tensor:
    """Return the weights of remembered Ritz vectors, shape [m], from their values relative to the
    leading one."""
    return RUNNER_UP_WEIGHT * nearness


def remembered(result: EigenResult, weigh: Callable[[Tensor], Tensor] = by_value) -> Tensor:
    """The start vector [size] that sums up a search: the weighted Ritz vectors and the direction it
    would have gone on.

    Args:
        result: of Lanczos.
        weigh: the weights of its Ritz vectors; the leading one counts 1 whatever it says.
    """
    assert result.direction is not None  # Lanczos gives one
    tiny = torch.finfo(result.direction.dtype).tiny
    # Where negative values lead (which="LA" of a negative matrix), those after them are the larger
    # ones: at most 1.
    nearness = (result.values.abs() / result.values[0].abs().clamp_min(tiny)).clamp_max(1)
    weights = weigh(nearness)
    weights[0] = 1
    direction = DIRECTION_WEIGHT * normalised(result.direction)
    return torch.cat([result.vectors * weights, direction[:, None]], dim=1).sum(dim=1).detach()


def _mixed(seed: int, call: int) -> int:
    """Return one 63-bit seed for each pair, of any size: a shifted sum would overflow a generator's
    64 bits."""
    digest = hashlib.blake2b(f"{seed},{call}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _averaged(average: float | None, value: float, window: int) -> float:
    """Return the exponential moving average after one more value; the first value starts it."""
    return value if average is None else average + 2 / (window + 1) * (value - average)
