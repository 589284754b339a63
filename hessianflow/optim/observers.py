"""Gradient observers that measure mean gradient norms for CLARS, without a host sync.

- :class:`MicrobatchNorms`: mean gradient norm of the microbatches for each tensor, which costs
  nothing extra with accumulation.
- :class:`ExtraBatchNorms`: the same from extra small batches, or true per-example norms, at a
  chosen frequency.

On several ranks (`join`) both average over the batches of all ranks, with one small sum per step.
:class:`hessianflow.optim.GradientMoments` is the observer for controllers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from hessianflow.batches import num_examples
from hessianflow.checks import check_choice, check_count
from hessianflow.interfaces import NO_SIGNALS, Batch, HessianFlowError, LossFn, NormMode, Reducer
from hessianflow.losses import mean_loss
from hessianflow.measuring import measuring
from hessianflow.optim.foreach import norms


class _NormTable:
    """Mean norms by parameter, which can be read in any order."""

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
        self.params = trainable
        self._orders = {}
        self._position = {parameter: index for index, parameter in enumerate(trainable)}

    def join(self, reducer: Reducer) -> None:
        """Average over the gradients of all ranks from now on."""
        self._reducer = reducer

    def _sum_over_ranks(self) -> None:
        if self._reducer is None or self._reducer.world_size == 1:
            return
        own = torch.zeros(len(self.params) + 1, dtype=self._dtype(), device=self.params[0].device)
        if self._sum is not None:  # a rank may have had no examples
            own[:-1] = self._sum
            own[-1] = self._examples
        total = self._reducer.sum(own)
        self._sum = total[:-1]
        self._examples = total[-1]

    def _dtype(self) -> torch.dtype:
        return norms([self.params[0].detach()]).dtype

    def _add(self, gradient_norms: Tensor, examples: int) -> None:
        weighted = gradient_norms * examples
        self._sum = weighted if self._sum is None else self._sum + weighted
        self._examples += examples

    def _clear(self) -> None:
        self._sum = None
        self._examples = 0

    def mean_norms(self, params: Sequence[Tensor]) -> Tensor:
        """Return the mean norm of each of `params`, weighted by examples, shape [len(params)].

        Raises:
            HessianFlowError: Nothing was measured, or a parameter is not among those watched.
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
    """Mean gradient norm of each parameter over the microbatches of a step, weighted by examples.

    Args:
        params: Parameters of the model, in the order of the gradients that will be shown; frozen
            ones are left out. None: :meth:`watch` must name them first, as the trainer does.

    Raises:
        HessianFlowError: There is no trainable parameter.
    """

    def __init__(self, params: Iterable[Tensor] | None = None) -> None:
        super().__init__(params)
        self._complete = False

    def bind(self, parameters: Iterable[Tensor]) -> None:
        """Take later gradients as those of `parameters`, in that order, and drop earlier norms.

        Args:
            parameters: Parameters of the model; frozen ones are left out.

        Raises:
            HessianFlowError: There is no trainable parameter.
        """
        self._take(parameters)
        self._clear()
        self._complete = False

    def join(self, reducer: Reducer) -> None:
        """Average over all ranks from now on; drop the microbatches of an interrupted step."""
        super().join(reducer)
        if not self._complete:
            self._clear()

    def on_microbatch(self, gradients: Sequence[Tensor], examples: int) -> None:
        """Add one microbatch; the first one after a step starts a new mean.

        Raises:
            HessianFlowError: The gradients do not match the watched parameters, or none are
                watched.
        """
        self._check(gradients)
        if self._complete:
            self._clear()
            self._complete = False
        self._add(norms(list(gradients)), examples)

    def on_step(self, gradients: Sequence[Tensor], examples: int) -> None:  # noqa: ARG002
        """Complete the mean over the microbatches of this step.

        Raises:
            HessianFlowError: The gradients do not match the watched parameters, or none are
                watched.
        """
        self._check(gradients)
        if self._complete:  # this rank had no microbatch
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
        """Return no signals, since the optimizer reads the norms on the device."""
        return NO_SIGNALS

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state, since nothing outlives a step."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Drop all norms, so that a new step begins."""
        self._clear()
        self._complete = False


class ExtraBatchNorms(_NormTable):
    """Mean gradient norm over extra small batches or single examples, measured every few steps.

    Measuring restores the modes and buffers of the model; see
    :func:`hessianflow.measuring.measuring`.

    Args:
        model: Model whose trainable parameters are watched.
        loss_fn: Loss function of the training.
        draw: Function that returns the small batches of one measurement (64 of 8 examples in the
            official CLARS code); the caller owns the sampling and its generator.
        every: Steps between measurements (1 in the official code).
        per_sample: Measure the gradients of single examples (the paper's sum) instead of small
            batches. Batch normalisation then uses running statistics.
        norm_mode: Statistics of batch normalisation for small batches; "batch" as in the official
            code.

    Raises:
        HessianFlowError: `every` is not a whole number >= 1, or `per_sample` is combined with batch
            statistics.
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
        self.model = model
        self.loss_fn = loss_fn
        self.draw = draw
        self.every = every
        self.per_sample = per_sample
        self.norm_mode = norm_mode
        self._steps = 0

    def bind(self, parameters: Iterable[Tensor]) -> None:  # noqa: ARG002
        """Read again which parameters of the model are trainable; the next step measures."""
        self._take(self.model.parameters())
        self._clear()
        self._steps = 0

    def on_microbatch(self, gradients: Sequence[Tensor], examples: int) -> None:
        """Do nothing, since the gradients come from the extra batches."""

    def on_step(self, gradients: Sequence[Tensor], examples: int) -> None:  # noqa: ARG002
        """Measure at every `every`-th step, at the weights from which the step starts."""
        if self._steps % self.every == 0:
            self.measure()
        self._steps += 1

    def measure(self) -> None:
        """Draw the extra batches and replace the mean norms.

        Raises:
            HessianFlowError: No batch was drawn.
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
        # One more dimension, since a parameter without any has none to flatten.
        return torch.stack(
            [gradient.unsqueeze(-1).flatten(1).norm(dim=1).mean() for gradient in gradients]
        )

    def signals(self) -> Mapping[str, float]:
        """Return no signals, since the optimizer reads the norms on the device."""
        return NO_SIGNALS

    def state_dict(self) -> dict[str, Any]:
        """Return the current norms and the number of steps."""
        return {"sum": self._sum, "examples": self._examples, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state that :meth:`state_dict` returned."""
        device = self.params[0].device
        self._sum = None if state["sum"] is None else state["sum"].to(device)
        self._examples = state["examples"]
        self._steps = state["steps"]
