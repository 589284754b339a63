"""The common base of the Hessian, Gauss-Newton and Fisher operators of a model.

The operator is that of the mean loss over all examples, L(w) = 1/N sum_n loss(f(x_n; w), y_n).
Every piece that is forwarded is weighted by the divisor of its mean (:mod:`hessianflow.losses`).
Unequal batches and any microbatch size therefore give the same matrix. Where the weight is a guess,
the losses of the first pieces are compared with that of the whole.

The graph of a single batch in one pass is built once and kept for all products (`release()` frees
it). It is rebuilt as soon as a weight, a buffer, the batch or an option of the loss has changed
(staleness.py). With several batches, or with microbatches, the graph of each piece is rebuilt in
every product, and memory does not depend on the number of pieces.

The measured function is the model in evaluation mode with gradients enabled. Backward hooks of
parameters and modules are set aside: they belong to the training step, not to the matrix.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hessianflow.batches import explaining_types, num_examples, split
from hessianflow.curvature.derivatives import UNREACHED, check_reached, explained
from hessianflow.curvature.differences import EXAMPLES, Linearised, find_disagreement
from hessianflow.curvature.forwarded import ForwardedData
from hessianflow.curvature.measurable import check_options, check_present, uses_batch_statistics
from hessianflow.curvature.operator import Operator
from hessianflow.curvature.operator_checks import ProductCheck, RepeatCheck
from hessianflow.curvature.pieces import NO_TARGET, Kept, Piece, check_finite, counted
from hessianflow.curvature.selection import Selection, select_parameters
from hessianflow.curvature.staleness import Snapshot
from hessianflow.curvature.surroundings import differentiating, full_precision, without_hooks
from hessianflow.curvature.vectors import flatten, usable_in_graph, vector_dtype
from hessianflow.interfaces import HessianFlowError, LossFn, NormMode
from hessianflow.losses import Averaged, BatchLoss, Forwarded, SplitCheck
from hessianflow.measuring import measuring, unwrap
from hessianflow.normalisation.statistics import compared_losses, moving_layers


class ModelOperator(Operator):
    """A curvature matrix of the mean loss of a model over some data.

    Args:
        model: any module; DataParallel, DistributedDataParallel and torch.compile are unwrapped.
        loss_fn: loss_fn(outputs, targets). Losses of any reduction (mean, sum, (sum, count), one
            for each example) are averaged over the targets that count; a sum must say so by a
            `reduction` attribute. For a dict batch, and always if it is an hf.ModelLoss, it is
            called as loss_fn(model, batch); hf.ModelLoss() is the model's own loss.
        data: one pair (inputs, targets), one mapping or dataclass, or a re-iterable of them (a
            list, a DataLoader without random augmentation), told apart as by `batches.as_batches`.
            For a pair the model is called as model(inputs).
        params: trainable parameters to differentiate by: None for all, name patterns ("layer1",
            "*.bias"), or tensors.
        microbatch_size: examples per forward pass; None for whole batches with a kept graph.
        norm_mode: batch normalisation by running statistics, "eval", or by the batch's own,
            "batch".
        check_deterministic: run the model twice for the first graph, to see whether its loss
            repeats.
        check_product: compare one product with a difference of gradients in float64
            (differences.py), if the model runs in float64. True: the first product. None: product
            100, where the check costs less than a percent, but the first one if the graph holds
            functions that are not torch's own or a selected parameter has no gradient. False:
            never, for a loss whose gradients are meant to differ from its values (a
            straight-through estimator, a detached term).

    Attributes:
        size: number of selected weights.
        dtype: type of the vectors: that of the weights, but float32 for 16-bit models.
        names: names of the selected parameters, in the order of the flat vector.
        is_part: whether the data are part of a larger batch, as on one of several ranks. The loss
            is then checked as if the batch were cut here. Set it before the first product.

    Raises:
        HessianFlowError: nothing is trainable, there are no data, or an option is wrong. At a
            product: the loss is not finite
            (:class:`~hessianflow.curvature.operator.NonFiniteError`), cannot be differentiated
            twice, or changes from one product to the next; the data are cut, and the loss is not
            the weighted mean of its pieces or outputs depend on other examples; parameters were
            frozen or replaced since; a difference of gradients contradicts the product.
    """

    takes_shards = False  # those of `fully_shard`

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: Any,
        *,
        params: Selection = None,
        microbatch_size: int | None = None,
        norm_mode: NormMode = "eval",
        check_deterministic: bool = True,
        check_product: bool | None = None,
    ) -> None:
        self._model = unwrap(model)
        check_options(self._model, microbatch_size, norm_mode, self.takes_shards)
        self.names, self.parameters = select_parameters(self._model, params)
        self.loss_fn = loss_fn
        self._loss = BatchLoss(loss_fn)
        self._check_split = SplitCheck(self._loss.mean)
        self.norm_mode = norm_mode
        self.microbatch_size = microbatch_size
        self._checking = ProductCheck(check_product)
        self.size = sum(p.numel() for p in self.parameters)
        self.device = self.parameters[0].device
        self.dtype = vector_dtype(self.parameters)
        self._data = ForwardedData(data, microbatch_size, self.device, self._loss)
        self._kept: Kept | None = None
        self._can_keep = True
        self.is_part = False
        self._snapshot: Snapshot | None = None  # of the last product without a kept graph
        self._repeats = RepeatCheck(check_deterministic, self.dtype)

    @abstractmethod
    def _prepare(self, model: nn.Module, batch: Any) -> Piece:
        """Run the model on one batch, and return its loss and the product with its matrix."""

    def on(self, data: Any) -> "ModelOperator":
        """Return the operator of the same loss on other data, a part of a larger batch.

        It shares the checks of this one, which are therefore not made again for every part.
        """
        twin = copy.copy(self)
        twin._data = ForwardedData(data, self.microbatch_size, self.device, self._loss)
        twin._kept = twin._snapshot = None
        twin.is_part = True
        return twin

    def __repr__(self) -> str:
        """Return one line with the model, the size of the matrix and where it is computed."""
        return (
            f"{type(self).__name__}({type(self._model).__name__}: {self.size:,} weights,"
            f" norm_mode={self.norm_mode!r}, {self.dtype} on {self.device})"
        )

    def release(self) -> None:
        """Free the kept graph; the next product builds it again, whatever has changed."""
        self._kept = None
        self._repeats.forget()

    @property
    def num_examples(self) -> int:
        """Return the number of examples the loss is averaged over; reads the data once."""
        return self._data.num_examples()

    @property
    def loss_weight(self) -> float:
        """Return the divisor of the mean loss: the number, or summed weights, of counting targets.

        Reads the data once, and runs the model on them where only the loss can tell.
        """
        pieces = self._data.pieces()
        if self._loss.mean.is_known:
            return sum(self._data.weight_ahead(batch) or 0.0 for batch in pieces)
        with measuring(self._model, self.norm_mode) as inner, full_precision():
            return sum(float(self._averaged(inner, batch).weight) for batch in pieces)

    def mean_loss(self) -> float:
        """Return the mean loss at the current weights."""
        with self._measuring() as model:
            return float(self._mean_loss(model, self._data.pieces(model)))

    def statistics_losses(self) -> tuple[float, float, float] | None:
        """Return the first batch's loss under running statistics, under its own, and its weight.

        `compared_losses` in :mod:`hessianflow.normalisation.statistics` says more. None where the
        matrix uses no running statistics that training moves.
        """
        layers = moving_layers(self._model)
        if self.norm_mode == "batch" or not layers:
            return None
        first = next(self._data.pieces(), None)
        if first is None:
            return 0.0, 0.0, 0.0
        return compared_losses(self._model, first, self._loss, layers)

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss by the selected parameters, shape [size]."""
        total, weight = self.weighted_gradient()
        return total.div_(counted(weight))

    def weighted_gradient(self) -> tuple[Tensor, float]:
        """Return (W g, W) for the gradient g and the :attr:`loss_weight` W; it may be 0."""
        whole = 0.0
        with self._measuring() as model:
            total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
            for batch in self._data.pieces(model):
                loss, weight = self._checked_loss(model, batch)
                if weight == 0:
                    continue
                grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
                check_reached(grads)
                total.add_(flatten(grads, self.parameters, self.dtype), alpha=weight)
                whole += weight
        return total, whole

    def _product(self, vector: Tensor) -> Tensor:
        with full_precision():
            product = self._unchecked_product(usable_in_graph(vector))
            if self._checking.is_due():
                self._check_product()
            return product

    def _unchecked_product(self, vector: Tensor) -> Tensor:
        if not self._can_keep or not self._data.is_one_piece:
            return self._rebuilt_product(vector)
        kept = self._kept_piece(self._data.single)
        try:
            return self._kept_product(kept, vector)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
        # The graph saved a buffer that the forward pass wrote to and that was then put back. Such
        # a graph cannot be used twice.
        self.release()
        self._can_keep = False
        return self._rebuilt_product(vector)

    def _kept_piece(self, batch: Any) -> Kept:
        if self._kept is None or not self._kept.snapshot.is_current():
            self._kept = None  # the old graph is freed before the new one is built
            check_present(self._model, self.names, self.parameters)
            snapshot = Snapshot(self._model, self.loss_fn, batch)
            with self._measuring() as model:
                local = next(self._data.pieces(), None)
                if local is None:
                    raise HessianFlowError(NO_TARGET)
                if self._repeats.is_due():
                    self._repeats.compare(snapshot, self._mean_loss(model, [local]))
                with explained(num_examples(batch)), explaining_types(self._model, batch):
                    piece = self._prepare(model, local)
                counted(piece.weight)
            snapshot.renew()  # buffers that were written to have new versions of their old values
            self._repeats.compare(snapshot, piece.loss)
            self._checking.note(piece.graph, piece.missing)
            self._kept = Kept(piece, snapshot, piece.graph.recomputes or bool(piece.graph.foreign))
        return self._kept

    def _kept_product(self, kept: Kept, vector: Tensor) -> Tensor:
        examples = num_examples(self._data.single)
        if kept.recomputes:
            with self._measuring(), explained(examples):
                product = kept.piece.product(vector)
            kept.snapshot.renew()
            return product
        # The model does not run, so only the hooks of its parameters could change the product.
        hooks = [parameter._backward_hooks for parameter in self.parameters]
        aside: Any = nullcontext()
        if any(hooks):
            aside = without_hooks(hooks)
        with explained(examples), aside:
            return kept.piece.product(vector)

    def _rebuilt_product(self, vector: Tensor) -> Tensor:
        total = torch.zeros_like(vector)
        whole = 0.0
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        check_present(self._model, self.names, self.parameters)
        if self._snapshot is None or not self._snapshot.is_current():
            self._snapshot = Snapshot(self._model, self.loss_fn, self._data.single)
        with self._measuring() as model:
            if self._repeats.is_due():
                again = self._mean_loss(model, self._data.pieces(model))
                self._repeats.compare(self._snapshot, again)
            for batch in self._data.pieces(model):
                with explained(num_examples(batch)), explaining_types(self._model, batch):
                    piece = self._prepare(model, batch)
                    if piece.weight == 0:
                        continue
                    self._checking.note(piece.graph, piece.missing)
                    total.add_(piece.product(vector), alpha=piece.weight)
                loss += piece.loss.double() * piece.weight
                whole += piece.weight
        self._snapshot.renew()
        self._repeats.compare(self._snapshot, loss / counted(whole))
        return total.div_(whole)

    def _measuring(self) -> AbstractContextManager[nn.Module]:
        return differentiating(self._model, self.norm_mode, self.parameters)

    def _averaged(self, model: nn.Module, batch: Any) -> Averaged:
        """Return the mean loss of one piece and its weight."""
        return self._forwarded(model, batch).averaged

    def _forwarded(self, model: nn.Module, batch: Any) -> Forwarded:
        """Run one piece, and check that the losses of pieces add up to that of the whole."""
        forwarded = self._run(model, batch)
        if self.is_part or not self._data.is_one_piece:
            outputs, targets = forwarded.arguments
            runs_model = isinstance(outputs, nn.Module)
            # A model that normalises by the batch computes another loss of other rows in any case.
            if not (runs_model and uses_batch_statistics(outputs, self.norm_mode)):
                self._check_split(outputs, targets)
        return forwarded

    def _run(self, model: nn.Module, batch: Any) -> Forwarded:
        return self._loss(model, batch)

    def _checked_loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        """Return the mean loss of a piece and its weight; check the loss unless the weight is 0."""
        averaged = self._averaged(model, batch)
        loss = averaged.value
        weight = float(averaged.weight)
        if weight > 0:
            check_finite(loss)
            if not loss.requires_grad:
                raise HessianFlowError(UNREACHED)
        return loss, weight

    def _mean_loss(self, model: nn.Module, pieces: Iterable[Any]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        whole = 0.0
        # Gradients stay enabled, as in a product: a loss may itself differentiate, by its inputs
        # for example.
        for batch in pieces:
            with explained(num_examples(batch)), explaining_types(self._model, batch):
                averaged = self._averaged(model, batch)
            weight = float(averaged.weight)
            if weight > 0:
                total += averaged.value.detach().double() * weight
                whole += weight
        return total / counted(whole)

    def _check_product(self) -> None:
        holders = [one for one in (self._model, self.loss_fn) if isinstance(one, nn.Module)]
        with self._measuring() as model:
            whole = next(self._data.pieces())
            samples: list[Callable[[], Any]] = [lambda: whole]
            if not uses_batch_statistics(self._model, self.norm_mode):
                samples.insert(0, lambda: next(split(whole, EXAMPLES)))
            linearise = partial(self._linearised, model)
            disagreement = find_disagreement(linearise, holders, self.parameters, samples)
        self._checking.conclude(disagreement, self.names)

    def _linearised(self, model: nn.Module, batch: Any, parameters: Sequence[Tensor]) -> Linearised:
        """Return the claims of one batch's graph, for parameters in place of those selected."""
        twin = copy.copy(self)
        twin.parameters = tuple(parameters)
        twin.dtype = torch.float64
        claims = twin._prepare(model, batch).claims
        if claims is None:
            raise HessianFlowError(NO_TARGET)
        return claims()
