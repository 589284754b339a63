"""The leading eigenvalue during training: small, repeatable, warm-started, free of side effects.

Given the optimizer that trains, it measures the sharpness that decides whether that one's steps are
stable: the largest eigenvalue of P^-1 H, with the optimizer's preconditioner P (geometry.py).

Each call measures the Hessian of the mean loss over the probe batch at the current weights. It
starts from the vectors of the last call (warm_start.py), so that a few products are enough. A
single warm reading may miss a value that has risen above the leading one since; the next calls find
it, and every `cold_every`-th call starts at random.

Our choices: the probe batch, 64 to 128 examples, is fixed by default, because batches differ by 8
to 10 %. Readings that are not finite, not converged or not reliable are returned as such and never
enter the smoothed value; the first two kinds do not enter the next start either.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from hessianflow.batches import num_examples
from hessianflow.curvature.checks import check_probe, check_search
from hessianflow.curvature.edge import Edge, ProbeOperator
from hessianflow.curvature.eigenpairs import top_eigenpairs
from hessianflow.curvature.hessian import HessianOperator
from hessianflow.curvature.measurable import check_options
from hessianflow.curvature.operator import NonFiniteError
from hessianflow.curvature.results import EigenResult, Which
from hessianflow.curvature.selection import Selection, listed
from hessianflow.curvature.smoothing import SmoothedValue, Smoothing
from hessianflow.curvature.warm_start import SPARE_VECTORS, remembered
from hessianflow.interfaces import (
    HESSIAN,
    CurvatureReading,
    JudgesStatistics,
    LinearOperator,
    LossFn,
    NormMode,
)
from hessianflow.measuring import unwrap
from hessianflow.normalisation.statistics import is_unsettled

GRADIENTS_PER_PRODUCT = 2.0
"""Cost of one product on a kept graph, in gradients of the same number of training examples: 1.8,
measured on a CPU with ResNet-20, products of 64 examples and steps of 128 (1.3 to 1.7 in gradients
of the same batch in evaluation mode), rounded up."""


_DEFAULT_WHICH: tuple[Which, Which] = ("LM", "LA")  # without an optimizer, and with one


class CurvatureProbe:
    """Measures the leading Hessian eigenvalues of a model repeatedly and leaves no trace on it.

    Args:
        model: the model; wrappers are removed.
        loss_fn: loss_fn(outputs, targets), or loss_fn(model, batch) for a dict batch.
        batch: the probe batch: a pair (inputs, targets) or a dict, kept for all calls; or a
            function without arguments that returns a fresh one for each call. 64 to 128 examples
            are enough.
        k: number of eigenvalues to track.
        tol: allowed relative error of each. The default is the tolerance of ABSA's code.
        warm_start: start from the vectors of the last reading.
        cold_every: every `cold_every`-th call starts at random, whatever the last vectors. The
            default is our choice.
        which: "LM" largest magnitude, "LA" largest or "SA" smallest algebraic; None: "LA" with an
            optimizer, because steps along negative curvature have no edge, "LM" without.
        params: parameters to differentiate by; see HessianOperator.
        norm_mode: batch-normalisation statistics, recorded with each reading.
        microbatch_size: examples per pass; bounds memory, at about 1.4 times the time.
        max_matvecs: most products per call; a search that needs more returns converged=False.
        first_matvecs: most products of the first call, whose price is not known beforehand. None:
            `max_matvecs`. 0: :meth:`is_affordable` says no until a call has been made regardless.
        smoothing: adds `details["smoothed"]`: the median of the last `window` good readings, or an
            exponential moving average of all of them, in which each has weight 2 / (window + 1).
        window: see `smoothing`.
        budget: largest share of the training cost to spend, for :meth:`is_affordable`; None sets no
            limit.
        seed: seed of the random parts of all starts.
        check_product: compare a product of the first call with a difference of gradients; see
            HessianOperator.
        check_statistics: in norm_mode "eval", compare the loss of up to 32 examples under running
            statistics with that under their own, and say in `reliable` whether the running ones
            have settled (normalisation/statistics.py). False takes that for granted, as the
            published code of ABSA does.
        optimizer: the optimizer that trains. The eigenvalues are then those of its preconditioned
            Hessian, as `matrix` says, and `details` says how near its steps are to their edge
            (edge.py); `note` says what does not hold.
        operator: makes the measured operator, called like HessianOperator; on several ranks
            `hessianflow.distributed.sharded(world)`.

    Raises:
        HessianFlowError: an option is out of range; at a call: as HessianOperator raises, except
            that weights or a loss that are not finite make a reading of nan.
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
        which: Which | None = None,
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
        optimizer: Optimizer | None = None,
        operator: Callable[..., ProbeOperator] = HessianOperator,
    ) -> None:
        which = which or _DEFAULT_WHICH[optimizer is not None]
        params = listed(params)  # an iterator can be read only once
        check_search(k, which, tol, max_matvecs)
        check_options(unwrap(model), microbatch_size, norm_mode)
        check_probe(cold_every, first_matvecs, budget)
        self._model = model
        self._batch = batch
        self._k = k
        self._norm_mode = norm_mode
        self._warm_start = warm_start
        self._cold_every = cold_every
        self._max_matvecs = max_matvecs
        self._first_matvecs = first_matvecs
        self._smoothed = SmoothedValue(smoothing, window)
        self._budget = budget
        self._seed = seed
        self._check_product = check_product
        self._check_statistics = check_statistics
        self._edge_of = partial(Edge, unwrap(model), optimizer, params)
        make = partial(operator, model, loss_fn, params=params, norm_mode=norm_mode)
        self._operator_of = partial(make, microbatch_size=microbatch_size)
        self._search = partial(top_eigenpairs, which=which, tol=tol, extra=SPARE_VECTORS)
        self._forget()

    def _forget(self) -> None:
        """Set the state of a probe that has measured nothing yet."""
        self._start: Tensor | None = None
        self._largest_loss = 0.0  # under the probe batch's own statistics
        self._calls = 0
        self._spent = 0.0
        self._last_cost = 0.0
        self.note = ""

    @property
    def model(self) -> nn.Module:
        """Return the measured model as the caller passed it."""
        return self._model

    def __call__(self) -> CurvatureReading:
        """Measure at the current weights."""
        began = time.perf_counter()
        batch = self._batch
        if callable(batch):
            batch = batch()
        examples = num_examples(batch)
        is_first = self._calls == 0
        # A new operator each time: no graph and no batch outlives the call. One check is enough.
        operator = self._operator_of(
            batch,
            check_deterministic=is_first,
            check_product=self._check_product and is_first,
        )
        unsettled = None
        result: EigenResult | None = None
        figures: dict[str, float] = {}
        matrix = HESSIAN
        try:
            edge = self._edge_of(operator)
            matrix = edge.matrix
            result = self._measure(edge.seen)
            figures = edge.figures(float(result.values[0]))
            result = replace(result, matvecs=result.matvecs + edge.matvecs)
            self.note = edge.note
            unsettled = self._unsettled_losses(operator)
        except NonFiniteError:
            result = None
            figures = {}
        finally:
            operator.release()
            self._calls += 1
        self._account(result, examples, unsettled is None)
        reading = self._reading(result, examples, unsettled, figures)
        return replace(reading, matrix=matrix, seconds=time.perf_counter() - began)

    def is_affordable(self, examples: int) -> bool:
        """Return whether the budget after `examples` training examples covers another call.

        The next call is taken to cost what the last one did. Cost is counted in gradients of one
        example, so the answer depends on no clock and repeats in a resumed run.
        """
        if self._calls == 0:
            return self._first_matvecs != 0
        if self._budget is None:
            return True
        return self._spent + self._last_cost <= self._budget * examples

    def state_dict(self) -> dict[str, Any]:
        """Return the state on which the next reading depends, besides the model and the batch."""
        return {
            "calls": self._calls,
            "spent": self._spent,
            "last_cost": self._last_cost,
            **self._smoothed.state_dict(),
            "largest_loss": self._largest_loss,
            "start": _clone(self._start),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a probe of the same model and options stopped."""
        self._calls = state["calls"]
        self._spent = state["spent"]
        self._last_cost = state["last_cost"]
        self._smoothed.load_state_dict(state)
        self._largest_loss = state["largest_loss"]
        self._start = _clone(state["start"])

    def _measure(self, operator: LinearOperator) -> EigenResult:
        start = self._start
        if self._calls % self._cold_every == 0:
            start = None
        most = self._max_matvecs
        if self._calls == 0 and self._first_matvecs:
            most = min(most, self._first_matvecs)
        return self._search(
            operator,
            min(self._k, operator.size),
            max_matvecs=most,
            v0=start,
            seed=_mixed(self._seed, self._calls),
            warm=start is not None,
        )

    def _unsettled_losses(self, operator: ProbeOperator) -> tuple[float, float] | None:
        """Return the losses under running and own statistics if the running ones are unsettled."""
        if not self._check_statistics or not isinstance(operator, JudgesStatistics):
            return None
        losses = operator.statistics_losses()
        if losses is None:
            return None
        running, own, weight = losses
        if weight == 0:
            return None
        if math.isfinite(own):
            self._largest_loss = max(self._largest_loss, abs(own))
        if is_unsettled(running, own, self._largest_loss):
            return running, own
        return None

    def _account(self, result: EigenResult | None, examples: int, reliable: bool) -> None:
        """Count the cost, and keep what the next start and the smoothed value need."""
        self._last_cost = float(examples)
        if result is not None:
            self._last_cost += GRADIENTS_PER_PRODUCT * result.matvecs * examples
        self._spent += self._last_cost
        if result is None:
            self._start = None
            return
        if not result.converged:
            return
        self._start = None
        if self._warm_start:
            self._start = remembered(result)
        if reliable:
            self._smoothed.add(float(result.values[0]))

    def _reading(
        self,
        result: EigenResult | None,
        examples: int,
        unsettled: tuple[float, float] | None,
        figures: Mapping[str, float],
    ) -> CurvatureReading:
        leading = residual = math.nan
        matvecs = 0
        tracked: tuple[float, ...] = ()
        if result is not None:
            leading = float(result.values[0])
            residual = float(result.residuals[0])
            matvecs = result.matvecs
            if self._k > 1:
                tracked = tuple(result.values[: self._k].tolist())
        return CurvatureReading(
            eigenvalue=leading,
            residual=residual,
            matvecs=matvecs,
            converged=result is not None and result.converged,
            eigenvalues=tracked,
            norm_mode=self._norm_mode,
            num_examples=examples,
            details=self._details(unsettled, figures),
            reliable=unsettled is None,
        )

    def _details(
        self, unsettled: tuple[float, float] | None, figures: Mapping[str, float]
    ) -> dict[str, float]:
        details = dict(figures)
        if unsettled is not None:
            details["running_loss"], details["own_loss"] = unsettled
        smoothed = self._smoothed.value()
        if smoothed is not None:
            details["smoothed"] = smoothed
        return details


def _mixed(seed: int, call: int) -> int:
    """Return a 63-bit seed for each pair of numbers, however large these are."""
    digest = hashlib.blake2b(f"{seed},{call}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _clone(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.clone()
