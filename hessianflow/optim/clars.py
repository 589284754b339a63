"""CLARS: complete layer-wise adaptive rate scaling.

Huo, Gu, Huang, "Large batch optimization for deep learning using new complete layer-wise adaptive
rate scaling", AAAI 2021, arXiv:2002.01576.

LARS divides by the norm of the mean gradient, which shrinks where the examples disagree. CLARS
divides by the mean norm A of the gradients of single examples or small batches:

    ratio = min(max_rate, eta * ||w|| / (A + eps)),      step as in LARS with the chosen form;

"larc" makes min(ratio / lr, 1) of that ratio.

As ratio_CLARS = ratio_LARS / M with the disagreement M = A / ||mean gradient|| >= 1, layers whose
examples disagree move less; the paper claims that no warm-up is needed then.

The observers of :mod:`hessianflow.optim.observers` measure A: the microbatches of gradient
accumulation give it without extra cost; otherwise extra small batches at a chosen frequency do.
Weight decay enters the step but not A.

The official code corresponds to form="late", eps=1e-6, decay_vectors=True, weight_decay=2e-4, and
an ExtraBatchNorms that draws 64 batches of 8 before every step with norm_mode="batch". Deviations
from it: the trust coefficient is the same in the first step (there 0.001, then 0.01); the cap is a
setting (there 0.1); layers are excluded by dimension, not by name; the extra batches do not change
the statistics of batch normalisation; eps is not also added to ||g + b w||, as that norm cancels.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hessianflow.checks import check_limit
from hessianflow.interfaces import HessianFlowError
from hessianflow.optim.foreach import Tensors, norms
from hessianflow.optim.lars import LARS, Form
from hessianflow.optim.observers import MicrobatchNorms


@runtime_checkable
class NormEstimator(Protocol):
    """An object that knows the mean gradient norm of small batches for each tensor."""

    def mean_norms(self, params: Sequence[Tensor]) -> Tensor:
        """Return A for each of `params`, shape [len(params)], on their device."""
        ...


class CLARS(LARS):
    """LARS with the mean norm of small-batch gradients in place of the norm of the mean gradient.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate; a 0-dim tensor only with `capturable`.
        momentum: Momentum m.
        weight_decay: Weight decay in the step, which does not enter A.
        trust_coefficient: Factor eta of the ratio (0.01 in the official code).
        max_rate: Cap of the ratio (0.1 in the official code); None for no cap.
            :meth:`capped_share` says how often it is reached.
        norms: Estimator of A. None: a :class:`MicrobatchNorms`, which the attribute `norms` holds,
            to be attached as an observer of the training loop. The trainer tells it whose gradients
            it shows. Your own loop shows those of `params` in their order, or, with several groups,
            first calls `norms.bind(model.parameters())`.
        eps: Number added to A.
        form: Published form, which says where the rate enters; "late" as in the official code.
        nesterov: Step along (scaled gradient) + momentum * buffer, as `torch.optim.SGD` does.
        adapt_vectors: Also adapt tensors of at most one dimension (biases, normalisation).
        decay_vectors: Also apply weight decay to tensors of at most one dimension.
        capturable: Allow `lr` to be a tensor on the device, as in LARS.

    Raises:
        HessianFlowError: An option is out of the bounds of LARS, or `max_rate` is not positive.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.01,
        max_rate: float | None = 0.1,
        norms: NormEstimator | None = None,
        eps: float = 0.0,
        form: Form = "late",
        nesterov: bool = False,
        adapt_vectors: bool = False,
        decay_vectors: bool = False,
        capturable: bool = False,
    ) -> None:
        check_limit("max_rate", max_rate, "no cap")
        if norms is not None and not isinstance(norms, NormEstimator):
            raise HessianFlowError(
                "norms must know mean gradient norms, such as MicrobatchNorms(), got a"
                f" {type(norms).__name__}"
            )
        super().__init__(
            params,
            lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            eps=eps,
            form=form,
            nesterov=nesterov,
            adapt_vectors=adapt_vectors,
            decay_vectors=decay_vectors,
            capturable=capturable,
        )
        self.max_rate = max_rate
        # The order of parameters in several groups is not that of the gradients, so `watch` must
        # tell it.
        own = self.param_groups[0]["params"] if len(self.param_groups) == 1 else None
        self.norms = norms or MicrobatchNorms(own)
        self._tally: Tensor | None = None

    def capped_share(self) -> float:
        """Return the fraction of layer ratios since the last call that the cap bound.

        It is 0 before any step. The call waits for the device.
        """
        if self._tally is None:
            return 0.0
        capped, seen = self._tally.tolist()
        self._tally.zero_()
        return float(capped / max(seen, 1))

    def layer_ratios(self, group: dict[str, Any]) -> dict[Tensor, float]:
        """Return the ratio of each tensor of a group as LARS does, but not before norms are known.

        It counts nothing for :meth:`capped_share`.
        """
        tally = self._tally
        self._tally = None
        try:
            return super().layer_ratios(group)
        except HessianFlowError:  # no norms yet
            return {}
        finally:
            self._tally = tally

    def _ratios(
        self,
        group: dict[str, Any],
        params: Tensors,
        grads: Tensors,  # noqa: ARG002
        decayed: Tensors,  # noqa: ARG002
        decay: float,  # noqa: ARG002
    ) -> Tensor:
        weight = norms(params)
        small = self.norms.mean_norms(params)
        ratio = group["trust_coefficient"] * weight / (small + group["eps"])
        has_ratio = (weight > 0) & (small > 0)
        ratio = self._capped(torch.where(has_ratio, ratio, 1.0))
        # A ratio of 1 because a norm is 0 is not divided by the rate, as in LARS.
        if group["form"] == "larc":
            ratio = torch.where(has_ratio, (ratio / group["lr"]).clamp(max=1.0), ratio)
        return ratio

    def _capped(self, ratio: Tensor) -> Tensor:
        if self.max_rate is None:
            return ratio
        if self._tally is None:
            self._tally = torch.zeros(2, dtype=torch.float64, device=ratio.device)
        # In place and on the device, so that counting does not synchronise and works in a captured
        # graph.
        self._tally[0] += (ratio > self.max_rate).sum()
        self._tally[1] += len(ratio)
        return ratio.clamp(max=self.max_rate)
