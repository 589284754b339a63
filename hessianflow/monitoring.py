"""Curvature, noise and the edge of stability of any training loop, as numbers for any logger."""

import math
import time
import warnings
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from hessianflow.curvature import HessianOperator, NonFiniteError, noise_scale, top_eigenpairs
from hessianflow.curvature.critical_rate import CriticalRate, critical_rate, critical_rate_on
from hessianflow.curvature.geometry import OptimizerGeometry, optimizer_geometry
from hessianflow.curvature.noise_parts import TooFewPartsError
from hessianflow.curvature.preconditioned import PreconditionedOperator
from hessianflow.curvature.sharded_loss import ShardedLoss, by_first_derivatives
from hessianflow.interfaces import HessianFlowError, LossFn, NormMode
from hessianflow.measuring import unwrap
from hessianflow.sharding import own_part

TOLERANCE = 1e-2
"""Relative error of the sharpness. Our choice."""
PARTS = 16
"""Parts of the batch from whose gradients the noise is taken. Our choice: with batch normalisation
each is a batch of its own, so they must not be small."""
LEAST_PRODUCTS = 4
"""Fewest products with which a search for the sharpness is worth a start. Our choice."""
KEPT = 0.7
"""Cost of a product on a kept graph, in products that build theirs (1.7 of 2.8 gradients, rounded
up)."""
NOISE = 3.0
"""Cost of the noise scale of a batch, in products that build their graph."""

NAMES = (
    "learning_rate",
    "sharpness",
    "threshold",
    "edge_share",
    "critical_rate",
    "noise_scale",
    "critical_batch",
    "converged",
    "products",
    "seconds",
)


def monitor(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    optimizer: Optimizer,
    *,
    seconds: float = 10.0,
    norm_mode: NormMode = "batch",
    microbatch_size: int | None = None,
) -> dict[str, float]:
    """Return how near the edge training is, and how large a batch is worth its examples.

    Call it now and then, between two steps. It needs no controller and no trainer, and leaves
    model, optimizer, gradients and random generators as they were.

    In DistributedDataParallel, every process measures for itself and waits for no other. One may
    call alone, and with its own share of the batch its figures describe that share. If
    `fully_shard` (FSDP2) shards the model, all ranks must call together, either with the same batch
    or each with its share. Their figures then describe all examples. Figures that need second
    derivatives are nan, and a warning says so.

    Args:
        model: the model; wrappers are removed.
        loss_fn: loss_fn(outputs, targets), or loss_fn(model, batch) for a dict batch; the model's
            own is hf.ModelLoss(). Whatever its reduction, the mean over examples is measured: train
            with the mean, too.
        batch: 64 to 512 examples, best the same ones each time: a pair (inputs, targets) or a dict.
        optimizer: the one that trains, of any kind.
        seconds: time to spend. The first figure, one product, is measured in any case and tells the
            price of the others; what would not fit any more is left out.
        norm_mode: statistics of batch normalisation; the default is that of training.
        microbatch_size: examples per pass; None for all at once.

    Returns:
        These numbers, nan where one is not known or was left out:

        - "learning_rate": of the first group with a rate.
        - "sharpness": the top eigenvalue of P^-1 H with the optimizer's preconditioner P; 2 /
          (critical rate) if it has none (Muon, unknown ones, Adam before its first step).
        - "threshold": steps are stable while learning_rate * sharpness is below it.
        - "edge_share": the share of the threshold in use: above 1, steps grow along an eigenvector.
        - "critical_rate": the rate at which the next update would leave the loss where it is.
        - "noise_scale": tr(C) / |G|^2 in examples; "critical_batch": tr(H C) / (G.HG), beyond which
          more examples help little. Both take P^-1 times the gradient for the gradient, and are
          infinite where noise hides the gradient of so few examples.
        - "converged": 1 if the sharpness met its tolerance of a percent, else 0; "products" and
          "seconds" spent.

    Raises:
        HessianFlowError: the arguments do not fit together, as HessianOperator raises, or the
            optimizer holds no weight of the model. Weights or a loss that are not finite give nan.

    Example:
        >>> import hessianflow as hf
        >>> model = nn.Linear(2, 1)
        >>> batch = torch.randn(64, 2), torch.randn(64, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> figures = hf.monitor(model, nn.MSELoss(), batch, optimizer)
        >>> 0 < figures["edge_share"] < 1
        True
    """
    if not seconds > 0:
        raise HessianFlowError(f"seconds must be positive, got {seconds}")
    began = time.perf_counter()
    geometry = optimizer_geometry(optimizer)
    figures = dict.fromkeys(NAMES, math.nan)
    figures |= {"learning_rate": geometry.rate, "threshold": geometry.threshold, "products": 0.0}
    options: dict[str, Any] = {"norm_mode": norm_mode, "microbatch_size": microbatch_size}
    operator = by_first_derivatives(model, loss_fn, batch, check_deterministic=False, **options)
    is_sharded = isinstance(operator, ShardedLoss)
    if is_sharded:
        warnings.warn(
            "hf.monitor leaves out figures that need second derivatives, such as the critical"
            " batch: the model is sharded by fully_shard (DTensor)",
            stacklevel=2,
        )
    if not set(operator.parameters) & set(geometry.parameters):
        raise HessianFlowError(
            f"the {geometry.name} holds no trainable weight of the model: pass the optimizer that"
            " trains it, made of its parameters as they are now"
        )
    try:
        _along_the_update(figures, operator, (model, loss_fn, batch), optimizer, geometry, options)
        price = time.perf_counter() - began
        if geometry.linear and not is_sharded:
            left = seconds - price * (1 + NOISE)
            if left < LEAST_PRODUCTS * KEPT * price:  # rather the sharpness than the noise
                left = seconds - price
            _sharpness(figures, operator, geometry, int(min(left / (KEPT * price), 100.0)))
        operator.release()
        fits = float(began + seconds - time.perf_counter() >= NOISE * price)
        # All ranks must measure together, so one rank that has the time left is enough.
        if operator.over_ranks(torch.tensor(fits)) > 0:
            _noise(figures, geometry, operator, (model, loss_fn, batch), options)
    except NonFiniteError:
        pass  # what was measured before stays; the rest is nan
    finally:
        operator.release()
    figures["seconds"] = time.perf_counter() - began
    return figures


def _along_the_update(
    figures: dict[str, float],
    operator: HessianOperator,
    problem: tuple[nn.Module, LossFn, Any],
    optimizer: Optimizer,
    geometry: OptimizerGeometry,
    options: dict[str, Any],
) -> None:
    found: CriticalRate
    try:
        if isinstance(operator, ShardedLoss):
            found = critical_rate(*problem, optimizer, form="forward", **options)
        else:
            found = critical_rate_on(operator, unwrap(problem[0]), optimizer)
    except NonFiniteError:
        raise
    except HessianFlowError:
        if geometry.linear or isinstance(operator, ShardedLoss):
            raise
        return  # an optimizer that needs a closure has no update to measure along
    figures["products"] += found.products
    figures["critical_rate"] = found.critical
    if not geometry.linear:
        figures["sharpness"] = found.sharpness
        figures["edge_share"] = geometry.edge_share(found.sharpness)
        figures["converged"] = float(math.isfinite(found.sharpness))


def _sharpness(
    figures: dict[str, float], operator: HessianOperator, geometry: OptimizerGeometry, most: int
) -> None:
    if most < LEAST_PRODUCTS:
        return
    seen = PreconditionedOperator(operator, geometry)
    result = top_eigenpairs(seen, which="LA", tol=TOLERANCE, max_matvecs=most, seed=0)
    figures["products"] += result.matvecs
    figures["sharpness"] = float(result.values[0])
    figures["edge_share"] = geometry.edge_share(figures["sharpness"])
    figures["converged"] = float(result.converged)


def _noise(
    figures: dict[str, float],
    geometry: OptimizerGeometry,
    operator: HessianOperator,
    problem: tuple[nn.Module, LossFn, Any],
    options: dict[str, Any],
) -> None:
    factors = None
    if geometry.linear:
        factors = [
            own_part(
                torch.as_tensor(geometry.inverse(p), dtype=operator.dtype, device=p.device)
            ).expand_as(own_part(p))
            for p in operator.parameters
        ]
    if isinstance(operator, ShardedLoss):
        options = {**options, "form": "simple"}
    try:
        found = noise_scale(*problem, update=factors, parts=PARTS, **options)
    except NonFiniteError:
        raise
    except TooFewPartsError:
        return
    except HessianFlowError as error:
        # Such as a loss that is no mean over examples: then the figures above are not right either.
        warnings.warn(f"hf.monitor leaves out the noise scale: {error}", stacklevel=3)
        return
    figures["products"] += found.matvecs / found.num_parts
    figures["noise_scale"] = found.simple.value
    figures["critical_batch"] = found.with_curvature.value
