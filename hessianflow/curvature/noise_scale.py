"""The gradient noise scale with curvature: the batch beyond which more examples help little.

Reference: McCandlish, Kaplan, Amodei, An empirical model of large-batch training, 2018
(arXiv:1812.06162). On a quadratic model of the loss, a step of B examples at its best rate gains
1 / (1 + B_noise / B) of what the step along the true gradient G gains, with

    B_noise = tr(H C) / (G.HG),

where C is the covariance of the gradient of one example. The usual form, tr(C) / |G|^2, takes the
Hessian for a multiple of the identity. An optimizer that steps along u = P^-1 g in place of g has
u in place of g in both forms.

The data are cut into parts. Each part gives one gradient, and two products of its Hessian with
gradients of other parts; noise_ratio.py says how unbiased estimates and their errors follow. A
product runs over one part only, so all products cost as much as two over all data, and the whole as
much as 9 gradients of all data (ResNet-20 on a processor, 8 parts of 16 examples).

An update that is not linear in the gradient (Muon, signs) has no noise per example. Then u is that
of a part, and the result holds for batches as large as a part: with n examples in a part,
1 + B_noise / n is E[u.Hu] / (E[u].H E[u]).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, get_args

import torch
from torch import Tensor, nn

from hessianflow.batches import num_examples, split
from hessianflow.checks import check_choice, check_count
from hessianflow.curvature.hessian import HessianOperator
from hessianflow.curvature.noise_parts import LEAST_PARTS, Form, Ring
from hessianflow.curvature.noise_ratio import RatioEstimate
from hessianflow.curvature.selection import Selection, batches_of, checked_batches, single_batch
from hessianflow.curvature.sharded_loss import by_first_derivatives
from hessianflow.curvature.vectors import estimating, flatten
from hessianflow.interfaces import HessianFlowError, LossFn, NormMode
from hessianflow.sharding import own_part

PARTS = 32
"""Parts that one batch is cut into. This default is our choice: with fewer, the error itself is
uncertain; with more, passes are less efficient."""

_NAN = math.nan
NOT_MEASURED = RatioEstimate(
    *(_NAN, _NAN, _NAN, _NAN),
    *(_NAN, _NAN, _NAN, _NAN),
    reason='not measured: form="simple" takes no products',
)
"""Stands for the ratio with curvature where no product is taken."""

Update = Sequence[Tensor] | Callable[[list[Tensor]], Sequence[Tensor]]
"""Factors for the gradient, one tensor in the shape of each selected parameter; or a function from
gradients in those shapes to updates."""


@dataclass(frozen=True)
class NoiseScaleResult:
    """The noise scale of a model's loss over some data.

    Attributes:
        with_curvature: tr(H C) / (U.HU), with U the mean update; nan in the form "simple".
        simple: tr(C) / |U|^2 from the same gradients.
        num_examples: examples measured.
        num_parts: independent gradients among them.
        matvecs: products, each with the Hessian of one part.
    """

    with_curvature: RatioEstimate
    simple: RatioEstimate
    num_examples: int
    num_parts: int
    matvecs: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "with_curvature": self.with_curvature.to_dict(),
            "simple": self.simple.to_dict(),
            "num_examples": self.num_examples,
            "num_parts": self.num_parts,
            "matvecs": self.matvecs,
        }


def noise_scale(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    update: Update | None = None,
    parts: int | None = None,
    params: Selection = None,
    microbatch_size: int | None = None,
    norm_mode: NormMode = "eval",
    form: Form = "product",
) -> NoiseScaleResult:
    """Measure the gradient noise scale in examples, with the Hessian and without.

    Numerators and denominators are unbiased, and the ratios have error bars. The model is left
    unchanged. In memory there are about ten vectors as large as the selected parameters, of which
    the products themselves take six, and the graph of one pass, however many examples there are.

    Args:
        model: the model.
        loss_fn: loss_fn(outputs, targets), or loss_fn(model, batch) for dict batches; any
            reduction, with the divisor of its mean as the weight of a part.
        data: one batch, which is cut into parts, or a re-iterable of batches in a fixed order, each
            of which is a part. Parts must be independent, as those of shuffled data are.
        update: what the optimizer makes of a gradient: factors by which it multiplies each
            parameter's gradient, such as 1 / (sqrt(v) + eps) of Adam, or a function. The function
            gets a list of tensors in the shapes of the selected parameters, which it may
            overwrite. None: the gradient itself, as for SGD.
        parts: number of parts of a single batch; default: 32. There are fewer where a part would
            hold a single example.
        params: trainable parameters to differentiate by; see ModelOperator.
        microbatch_size: examples per pass; None: a part in one pass.
        norm_mode: batch-normalisation statistics.
        form: "product", or "simple" for tr(C) / |U|^2 alone, which takes two gradients of all data
            and no second derivative. "simple" also works if `fully_shard` (FSDP2) shards the model.
            All ranks then call together, either with the same data or each with its share, cut into
            the same number of parts (the ranks' parts of one number make one part). `update` is
            then the update of a rank's shards.

    Raises:
        HessianFlowError: there are fewer than 4 parts with targets that count; the data change from
            one pass to the next; the update has other shapes than the parameters, or is not finite;
            or as HessianOperator.

    Example:
        >>> source = torch.Generator().manual_seed(0)
        >>> inputs = torch.randn(512, 4, generator=source)
        >>> targets = inputs.sum(1, keepdim=True) + torch.randn(512, 1, generator=source)
        >>> scale = noise_scale(nn.Linear(4, 1), nn.MSELoss(), (inputs, targets))
        >>> scale.with_curvature.is_known and 0 < scale.with_curvature.value < 100
        True
    """
    check_choice("form", form, get_args(Form))
    make: Callable[..., HessianOperator] = HessianOperator
    if form == "simple":
        make = by_first_derivatives
    whole = make(
        model,
        loss_fn,
        data,
        params=params,
        microbatch_size=microbatch_size,
        norm_mode=norm_mode,
    )
    held = [own_part(parameter) for parameter in whole.parameters]
    batches = whole.paired(_parts_of(data, parts))
    ring = Ring(whole, batches, _updater(update, held, whole.dtype), form)
    with estimating(whole):
        with_curvature, simple = ring.products()
    per_weight = ring.examples / ring.weight
    number = len(simple.noise)
    bent = NOT_MEASURED
    matvecs = 0
    if form == "product":
        bent = with_curvature.ratio(per_weight)
        matvecs = 2 * number
    return NoiseScaleResult(bent, simple.ratio(per_weight), ring.examples, number, matvecs)


def _parts_of(data: Any, parts: int | None) -> Callable[[], Iterable[Any]]:
    """Return a function that returns the parts of the data."""
    batches = batches_of(data)
    batch = single_batch(batches)
    if batch is None:
        if parts is not None:
            raise HessianFlowError(
                f"parts={parts} cuts one batch, but data are several: each of them is a part"
            )
        return lambda: checked_batches(batches)
    check_count("parts", parts, LEAST_PARTS, str(PARTS))
    size = -(-num_examples(batch) // (parts or PARTS))
    return lambda: split(batch, size)


def _updater(
    update: Update | None, parameters: Sequence[Tensor], dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Return a function from a flat gradient to a flat update."""
    if update is None:
        return lambda gradient: gradient
    if not callable(update):
        factors = _flat(list(update), parameters, dtype)
        return lambda gradient: gradient * factors

    def updated(gradient: Tensor) -> Tensor:
        with torch.no_grad():
            pieces = torch.split(gradient, [p.numel() for p in parameters])
            shaped = [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
            return _flat(list(update(shaped)), parameters, dtype)

    return updated


def _flat(pieces: Sequence[Tensor], parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return one flat vector, and refuse tensors that do not fit the parameters."""
    if len(pieces) != len(parameters):
        raise HessianFlowError(
            f"update must have a tensor for each of the {len(parameters)} parameters, got"
            f" {len(pieces)}"
        )
    for index, piece, parameter in zip(count(), pieces, parameters, strict=False):
        if piece.shape != parameter.shape:
            raise HessianFlowError(
                f"update number {index} must have the shape {[*parameter.shape]} of its parameter,"
                f" got {[*piece.shape]}"
            )
    return flatten([piece.detach() for piece in pieces], parameters, dtype)
