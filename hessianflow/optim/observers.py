"""Gradient observers: what microbatch gradients tell an optimizer or a controller, gathered without
a host sync.

- :class:`MicrobatchNorms`: mean gradient norm of the microbatches, tensor by tensor, for CLARS;
  free with accumulation.
- :class:`ExtraBatchNorms`: the same from extra small batches, or true per-example norms, at a
  chosen frequency.
- :class:`GradientMoments`: squared norms of small and large gradients, for the noise scale, CABS
  and DiveBatch.

On several ranks (`join`) all of them average over the microbatches of all ranks: one small sum a
step.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from hessianflow.batches import num_examples
from hessianflow.interfaces import NO_SIGNALS, Batch, HessianFlowError, LossFn, NormMode, Reducer
from hessianflow.losses import mean_loss
from hessianflow.measuring import measuring
from hessianflow.optim.checks import check_choice, check_count
from hessianflow.optim.foreach import norms


class _NormTable:
    """Mean norms by parameter, whatever the order they are asked for in."""

    def __init__(self, params: Iterable[Tensor] | None) -> None:
        self.params: list[Tensor] = []
        self._position: dict[Tensor, int] = {}
        self._orders: dict[tuple[int, ...], Tensor] = {}
        self._sum: Tensor | None = None
        self._examples: int | Tensor = 0
        self._reducer: Reducer | None = None
        if params is not None:
            self._take(params)

    def _take(self, params: Iterable[Tensor]) -> None:
        trainable = [parameter for parameter in params if parameter.requires_grad]
        if not trainable:
            raise HessianFlowError("params must hold at least one trainable parameter, got none")
        self.params, self._orders = trainable, {}
        self._position = {parameter: index for index, parameter in enumerate(trainable)}

    def join(self, reducer: Reducer) -> None:
        """Average over the gradients of all ranks from now on."""
        self._reducer = reducer

    def _sum_over_ranks(self) -> None:
        if self._reducer is None or self._reducer.world_size == 1:
            return
        own = torch.zeros(len(self.params) + 1, dtype=self._dtype(), device=self.params[0].device)
        if self._sum is not None:  # a rank may have had no examples
            own[:-1], own[-1] = self._sum, self._examples
        total = self._reducer.sum(own)
        self._sum, self._examples = total[:-1], total[-1]

    def _dtype(self) -> torch.dtype:
        return norms([self.params[0].detach()]).dtype

    def _add(self, gradient_norms: Tensor, examples: int) -> None:
        weighted = gradient_norms * examples
        self._sum = weighted if self._sum is None else self._sum + weighted
        self._examples += examples

    def _clear(self) -> None:
        self._sum, self._examples = None, 0

    def mean_norms(self, params: Sequence[Tensor]) -> Tensor:
        """Return the mean norm of each of `params`, weighted by examples, shape [len(params)].

        Raises:
            HessianFlowError: nothing was measured, or a parameter is not among those watched.
        """
        if self._sum is None:
            raise HessianFlowError(
                f"{type(self).__name__} has seen no gradient: attach it to the training loop as a"
                " gradient observer"
            )
        order = tuple(self._position.get(parameter, -1) for parameter in params)
        if -1 in order:
            raise HessianFlowError(
                f"params must be among the {len(self.params)} watched, "
                f"got another of shape {[*params[order.index(-1)].shape]}"
            )
        if order not in self._orders:
            self._orders[order] = torch.tensor(order, device=self._sum.device)
        return self._sum[self._orders[order]] / self._examples


class MicrobatchNorms(_NormTable):
    """Mean over the microbatches of the current step of ||gradient||, weighted by examples, for
    every parameter.

    Args:
        params: the model's parameters, in the order of the gradients it will be shown; frozen ones
            are left out. The trainer tells its own by :meth:`watch`. None: they must be told so.

    Raises:
        HessianFlowError: no trainable parameter.
    """

    def __init__(self, params: Iterable[Tensor] | None = None) -> None:
        super().__init__(params)
        self._complete = False

    def bind(self, parameters: Iterable[Tensor]) -> None:
        """Take the gradients shown from now on as those of `parameters`, in that order; what was
        seen is forgotten.

        Args:
            parameters: the model's; frozen ones are left out.

        Raises:
            HessianFlowError: no trainable parameter.
        """
        self._take(parameters)
        self._clear()
        self._complete = False

    def join(self, reducer: Reducer) -> None:
        """Average over the gradients of all ranks from now on; the microbatches of an interrupted
        step are dropped."""
        super().join(reducer)
        if not self._complete:
            self._clear()

    def on_microbatch(self, gradients: Sequence[Tensor], examples: int) -> None:
        """Add one microbatch; the first one after a step starts afresh.

        Raises:
            HessianFlowError: not one gradient a watched parameter, of its shape; or it is not known
                whose they are.
        """
        self._check(gradients)
        if self._complete:
            self._clear()
            self._complete = False
        self._add(norms(list(gradients)), examples)

    def on_step(self, gradients: Sequence[Tensor], examples: int) -> None:  # noqa: ARG002
        """The microbatches so far make up this step.

        Raises:
            HessianFlowError: as for a microbatch.
        """
        self._check(gradients)
        if self._complete:  # this rank had none
            self._clear()
        self._sum_over_ranks()
        self._complete = True

    def _check(self, gradients: Sequence[Tensor]) -> None:
        if not self.params:
            raise HessianFlowError(
                "MicrobatchNorms must know whose gradients it is shown: call bind(parameters) in"
                " their order first"
            )
        if len(gradients) != len(self.params):
            raise HessianFlowError(
                f"gradients must match the {len(self.params)} watched parameters, got"
                f" {len(gradients)}: call bind(parameters) with those shown"
            )
        for index, (gradient, parameter) in enumerate(zip(gradients, self.params, strict=True)):
            if gradient.shape != parameter.shape:
                raise HessianFlowError(
                    f"gradients must be in the order of the watched parameters, but number {index}"
                    f" has shape {[*gradient.shape]}, its parameter {[*parameter.shape]}: call"
                    " bind(parameters) in their order"
                )

    def signals(self) -> Mapping[str, float]:
        """None: the optimizer reads the norms on the device."""
        return NO_SIGNALS

    def state_dict(self) -> dict[str, Any]:
        """Nothing outlives a step."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Begin a step."""
        self._clear()
        self._complete = False


class ExtraBatchNorms(_NormTable):
    """Mean gradient norm over extra small batches (or single examples), measured before every
    `every`-th step.

    The model is measured in evaluation mode and left as found; see
    :func:`hessianflow.measuring.measuring`.

    Args:
        model: the model; its trainable parameters are the ones watched.
        loss_fn: as in training.
        draw: called at each measurement, returns the small batches (64 of 8 examples in the
            official CLARS code); the caller owns the sampling and its generator.
        every: steps between measurements (1 in the official code).
        per_sample: norms of the gradients of single examples (the paper's sum) instead of small
            batches. Batch normalisation then uses running statistics.
        norm_mode: statistics of batch normalisation for small batches; "batch" as in the official
            code.

    Raises:
        HessianFlowError: `every` is not a whole number >= 1, or `per_sample` with batch statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        draw: Callable[[], Iterable[Batch]],
        *,
        every: int = 1,
        per_sample: bool = False,
        norm_mode: NormMode = "eval",
    ) -> None:
        super().__init__(model.parameters())
        check_count("every", every)
        check_choice("norm_mode", norm_mode, get_args(NormMode))
        if per_sample and norm_mode == "batch":
            raise HessianFlowError(
                'norm_mode must be "eval" with per_sample: a single example has no batch statistics'
            )
        self.model, self.loss_fn, self.draw = model, loss_fn, draw
        self.every, self.per_sample, self.norm_mode = every, per_sample, norm_mode
        self._steps = 0

    def bind(self, parameters: Iterable[Tensor]) -> None:  # noqa: ARG002
        """Look at the model again, some of which may have been frozen or unfrozen; the next step
        measures."""
        self._take(self.model.parameters())
        self._clear()
        self._steps = 0

    def on_microbatch(self, gradients: Sequence[Tensor], examples: int) -> None:
        """Not used: the gradients come from the extra batches."""

    def on_step(self, gradients: Sequence[Tensor], examples: int) -> None:  # noqa: ARG002
        """Measure when it is time, at the weights that this step starts from."""
        if self._steps % self.every == 0:
            self.measure()
        self._steps += 1

    def measure(self) -> None:
        """Draw the extra batches and replace the mean norms.

        Raises:
            HessianFlowError: no batch was drawn.
        """
        self._clear()
        with measuring(self.model, self.norm_mode) as model:
            for inputs, targets in self.draw():
                examples = num_examples(targets)
                self._add(self._norms(model, inputs, targets), examples)
        self._sum_over_ranks()
        if self._sum is None:
            raise HessianFlowError("draw must return at least one batch, got none")

    def _norms(self, model: nn.Module, inputs: Any, targets: Any) -> Tensor:
        if self.per_sample:
            return self._per_sample_norms(model, inputs, targets)
        loss = mean_loss(self.loss_fn, model(inputs), targets)
        return norms(torch.autograd.grad(loss, self.params, materialize_grads=True))

    def _per_sample_norms(self, model: nn.Module, inputs: Any, targets: Any) -> Tensor:
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

        def loss_of_one(values: tuple[Tensor, ...], one_input: Any, one_target: Any) -> Tensor:
            outputs = torch.func.functional_call(
                model, dict(zip(names, values, strict=True)), (one_input,)
            )
            return mean_loss(self.loss_fn, outputs, one_target)

        pair = torch.utils._pytree.tree_map(lambda tensor: tensor.unsqueeze(1), (inputs, targets))
        values = tuple(parameter.detach() for parameter in self.params)
        gradients = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0))(
            values, *pair
        )
        # One more dimension, so that there is one to flatten where the parameter has none.
        return torch.stack(
            [gradient.unsqueeze(-1).flatten(1).norm(dim=1).mean() for gradient in gradients]
        )

    def signals(self) -> Mapping[str, float]:
        """None: the optimizer reads the norms on the device."""
        return NO_SIGNALS

    def state_dict(self) -> dict[str, Any]:
        """Return the norms in force and the steps seen."""
        return {"sum": self._sum, "examples": self._examples, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        device = self.params[0].device
        self._sum = None if state["sum"] is None else state["sum"].to(device)
        self._examples, self._steps = state["examples"], state["steps"]


class GradientMoments:
    """Squared gradient norms at two batch sizes, averaged between two calls of :meth:`signals`.

    With G the true gradient and S the trace of the covariance of one example's gradient, a mean
    gradient over b examples has E||g||^2 = ||G||^2 + S / b. Sizes are therefore reported as
    harmonic means, which keeps this exact when microbatches or steps differ in size.

    Signals (none before the first step):
        small_gradient_sq: mean of ||g||^2 over microbatches. small_batch_size: harmonic mean of
        their sizes. large_gradient_sq: mean of ||g||^2 over whole optimization batches.
        large_batch_size: harmonic mean of their sizes. gradient_sum_sq, gradient_examples: only
        with `accumulate`: ||sum of example gradients||^2, and how many.

    One microbatch a step tells nothing (both sizes are the same): set a smaller microbatch, or
    train on several ranks.

    Args:
        accumulate: also sum the gradients (one more copy of the parameters), for DiveBatch.
    """

    def __init__(self, *, accumulate: bool = False) -> None:
        self.accumulate = accumulate
        self._sums = _Sums()
        self._watched: list[Tensor] = []
        self._reducer: Reducer | None = None

    def bind(self, parameters: Iterable[Tensor]) -> None:
        """Take the gradients shown from now on as those of `parameters`; sums go on for those that
        were there before.

        Args:
            parameters: what is trained, in the order of the gradients.
        """
        before, self._watched = self._watched, list(parameters)
        if self._sums.total and before:
            known = dict(zip(before, self._sums.total, strict=True))
            self._sums.total = [known.get(p, torch.zeros_like(p)) for p in self._watched]

    def join(self, reducer: Reducer) -> None:
        """Count the microbatches of all ranks from now on; those of an interrupted step are
        dropped."""
        self._reducer = reducer
        self._sums.begin_step()

    def on_microbatch(self, gradients: Sequence[Tensor], examples: int) -> None:
        """Add one microbatch."""
        sums = self._sums
        sums.step_small = _plus(sums.step_small, gradients)
        sums.step_count += 1
        sums.step_inverse += 1 / examples

    def on_step(self, gradients: Sequence[Tensor], examples: int) -> None:
        """Add one optimization batch."""
        sums = self._sums
        self._close_step(gradients[0].device)
        sums.large = _plus(sums.large, gradients)
        sums.large_count += 1
        sums.large_inverse += 1 / examples
        sums.examples += examples
        if self.accumulate:
            sums.total = _beside(sums.total, gradients)
            torch._foreach_add_(sums.total, list(gradients), alpha=examples)

    def _close_step(self, device: torch.device) -> None:
        """Add this step's microbatches, of all ranks, to those before."""
        sums = self._sums
        small = torch.zeros((), device=device) if sums.step_small is None else sums.step_small
        count: float | Tensor = sums.step_count
        inverse: float | Tensor = sums.step_inverse
        if self._reducer is not None and self._reducer.world_size > 1:
            own = torch.tensor([0.0, count, inverse], dtype=torch.float64, device=device)
            own[0] = small
            small, count, inverse = self._reducer.sum(own)
        sums.small = small if sums.small is None else sums.small + small
        sums.small_count = sums.small_count + count
        sums.small_inverse = sums.small_inverse + inverse
        sums.begin_step()

    def signals(self) -> Mapping[str, float]:
        """Return the figures since the last call (the one synchronisation); starts afresh."""
        sums = self._sums
        if sums.small is None or sums.large is None:
            return NO_SIGNALS
        found = {
            "small_gradient_sq": float(sums.small) / float(sums.small_count),
            "small_batch_size": float(sums.small_count) / float(sums.small_inverse),
            "large_gradient_sq": float(sums.large) / sums.large_count,
            "large_batch_size": sums.large_count / sums.large_inverse,
        }
        if self.accumulate:
            found["gradient_sum_sq"] = float(norms(sums.total).square().sum())
            found["gradient_examples"] = float(sums.examples)
        self._sums = _Sums()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, as copies: the observer goes on adding to its own."""
        return copy.deepcopy(vars(self._sums))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, on the device of the gradients to
        come."""
        self._sums = _Sums(**copy.deepcopy(dict(state)))


@dataclass
class _Sums:
    """What GradientMoments has added up since its last report: device tensors and plain numbers."""

    step_small: Tensor | None = None
    step_count: int = 0
    step_inverse: float = 0.0
    small: Tensor | None = None
    small_count: float | Tensor = 0
    small_inverse: float | Tensor = 0.0
    large: Tensor | None = None
    large_count: int = 0
    large_inverse: float = 0.0
    examples: int = 0
    total: list[Tensor] = field(default_factory=list)

    def begin_step(self) -> None:
        """Forget the microbatches since the last whole step."""
        self.step_small, self.step_count, self.step_inverse = None, 0, 0.0


def _plus(total: Tensor | None, gradients: Sequence[Tensor]) -> Tensor:
    squared = norms(list(gradients)).square().sum()
    return squared if total is None else total.to(squared.device) + squared


def _beside(total: list[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return the total where the gradients are (one from a checkpoint may be elsewhere); zeros
    where there is none yet."""
    if not total:
        return [torch.zeros_like(gradient) for gradient in gradients]
    return [own.to(gradient.device) for own, gradient in zip(total, gradients, strict=True)]
