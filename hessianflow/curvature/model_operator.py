"""What the Hessian, Gauss-Newton and Fisher operators of a model share: data, weights, averages,
checks.

The operator is that of the mean loss over all examples, L(w) = 1/N sum_n loss(f(x_n; w), y_n).
Every piece that is forwarded is weighted by what its mean divides by (:mod:`hessianflow.losses`):
its number of examples or, with class weights or ignored targets, their sum. Unequal batches and any
microbatch size therefore give the same matrix. Where the weight is a guess, the first parts are
compared with the whole.

The graph of a single batch in one pass is built once and kept for all products (`release()` frees
it). It is rebuilt as soon as a weight, a buffer, the batch or an option of the loss has changed
(staleness.py). With several batches, or with microbatches, the graph of each piece is rebuilt in
every product, and memory does not depend on the number of pieces.

The measured function is the model in evaluation mode with gradients enabled. Backward hooks of
parameters and modules are set aside: they belong to the training step, not to the matrix.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hessianflow.batches import explaining_types, map_tensors, move, num_examples, split
from hessianflow.curvature.cut_check import check_cut
from hessianflow.curvature.derivatives import (
    UNREACHED,
    check_reached,
    explained,
    full_precision,
    second_order,
    without_hooks,
)
from hessianflow.curvature.differences import EXAMPLES, Linearised, find_disagreement
from hessianflow.curvature.double_backward import CheapDoubleBackward, has_replacements
from hessianflow.curvature.measurable import check_options, check_present, uses_batch_statistics
from hessianflow.curvature.operator import Operator
from hessianflow.curvature.pieces import NO_TARGET, Kept, Piece, check_finite, counted
from hessianflow.curvature.product_check import ProductCheck
from hessianflow.curvature.repeats import RepeatCheck
from hessianflow.curvature.selection import (
    Selection,
    batches_of,
    checked_batches,
    select_parameters,
    single_batch,
)
from hessianflow.curvature.staleness import Snapshot
from hessianflow.curvature.vectors import flatten, vector_dtype
from hessianflow.interfaces import HessianFlowError, LossFn, NormMode
from hessianflow.losses import Averaged, MeanLoss, SplitCheck
from hessianflow.measuring import measuring, unwrap
from hessianflow.normalisation.folded import folded_normalisation
from hessianflow.normalisation.statistics import compared_losses, moving_layers


class ModelOperator(Operator):
    """A curvature matrix of the mean loss of a model over some data.

    Args:
        model: any module; DataParallel, DistributedDataParallel and torch.compile wrappers are
            looked through.
        loss_fn: loss_fn(outputs, targets). Mean, sum (said by a `reduction` attribute), (sum,
            count) and per-example losses count alike, as the mean over what counts. For a batch
            that is a dict it is called as loss_fn(model, batch).
        data: one pair (inputs, targets), one dict, or a re-iterable of them (a list, a DataLoader
            without shuffled augmentation); told apart as in `batches.as_batches`. The model is
            called as model(inputs).
        params: trainable parameters to differentiate by: None for all, name patterns ("layer1",
            "*.bias"), or tensors.
        microbatch_size: examples per forward pass; None for whole batches with a kept graph.
        norm_mode: batch normalisation by running statistics ("eval") or by those of each batch
            ("batch").
        check_deterministic: run the model a second time when the first graph is kept, to see
            whether its loss repeats.
        check_product: compare a product with a difference of gradients, once and in float64
            (differences.py); it is left out where the model does not run in float64. None: where it
            costs less than a percent, at product 100, but with the first one where the graph holds
            functions that are not torch's own, or not all selected parameters have a gradient.
            False: leave it out, for a loss that is meant to have other gradients than its values (a
            straight-through estimator, a detached part).

    Attributes:
        size: number of selected weights.
        dtype: of the vectors: that of the weights, but float32 for 16-bit models.
        names: names of the selected parameters, in the order of the flat vector.
        is_part: whether the data are a part of a larger batch, as on one of several ranks. The loss
            is then checked as if the batch were cut here. Set it before the first product.

    Raises:
        HessianFlowError: nothing is trainable, there are no data, or an option is wrong. At a
            product: the loss is not finite
            (:class:`~hessianflow.curvature.operator.NonFiniteError`), cannot be differentiated
            twice, or changes from one product to the next; the data are cut, and the loss is not
            the weighted mean of its parts or outputs depend on other examples; parameters were
            frozen or replaced since; a difference of gradients contradicts the product.
    """

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
        check_options(self._model, microbatch_size, norm_mode)
        self.names, self.parameters = select_parameters(self._model, params)
        self.loss_fn = loss_fn
        self._loss = MeanLoss(loss_fn)
        self._check_split = SplitCheck(self._loss)
        self.norm_mode = norm_mode
        self.microbatch_size = microbatch_size
        self._checking = ProductCheck(check_product)
        self._batches = batches_of(data)
        self._single = single_batch(self._batches)
        self.size = sum(p.numel() for p in self.parameters)
        self.device = self.parameters[0].device
        self.dtype = vector_dtype(self.parameters)
        self._kept: Kept | None = None
        self._can_keep = True
        self.is_part = False
        self._is_cut_checked = False
        self._snapshot: Snapshot | None = None  # of the last product without a kept graph
        self._repeats = RepeatCheck(check_deterministic, self.dtype)

    @abstractmethod
    def _prepare(self, model: nn.Module, batch: Any) -> Piece:
        """Run the model on one batch and return its loss and what multiplies with its matrix."""

    def weighted_product(self, vector: Tensor) -> tuple[Tensor, float]:
        """Return (W A v, W), with W the :attr:`loss_weight` of the data held here.

        Several ranks sum both over their data and divide.
        """
        product, weight = self._mean_product(vector)
        return product * weight, weight

    def release(self) -> None:
        """Free the kept graph; the next product makes it anew, whatever has changed."""
        self._kept = None
        self._repeats.forget()

    @property
    def num_examples(self) -> int:
        """Examples the loss is averaged over (reads the data once)."""
        return sum(num_examples(batch) for batch in checked_batches(self._batches))

    @property
    def loss_weight(self) -> float:
        """What the mean loss divides by: examples, or the sum of the class weights of the targets
        that count.

        Reads the data once, and runs the model on them where only the loss can tell.
        """
        if self._loss.is_known:
            return sum(self._weight_ahead(batch) or 0.0 for batch in self._pieces())
        with measuring(self._model, self.norm_mode) as inner, full_precision():
            return sum(float(self._averaged(inner, batch).weight) for batch in self._pieces())

    def mean_loss(self) -> float:
        """Return the loss whose curvature this is, at the current weights."""
        with measuring(self._model, self.norm_mode) as inner, self._differentiating(inner) as model:
            return float(self._mean_loss(model, self._pieces(model)))

    def statistics_losses(self) -> tuple[float, float, float] | None:
        """Compare the loss under running statistics of normalisation with that under the data's
        own.

        See `compared_losses` in :mod:`hessianflow.normalisation.statistics`; of the first batch.
        None where the matrix uses no running statistics that training moves.
        """
        layers = moving_layers(self._model)
        if self.norm_mode == "batch" or not layers:
            return None
        first = next(self._pieces(), None)
        if first is None:
            return 0.0, 0.0, 0.0
        return compared_losses(self._model, first, self._loss, layers)

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss by the selected parameters, shape [size]."""
        total, whole = torch.zeros(self.size, dtype=self.dtype, device=self.device), 0.0
        with measuring(self._model, self.norm_mode) as inner, self._differentiating(inner) as model:
            for batch in self._pieces(model):
                loss, weight = self._checked_loss(model, batch)
                if weight == 0:
                    continue
                grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
                check_reached(grads)
                total.add_(flatten(grads, self.parameters, self.dtype), alpha=weight)
                whole += weight
        return total.div_(counted(whole))

    def _product(self, vector: Tensor) -> Tensor:
        return self._mean_product(vector)[0]

    def _mean_product(self, vector: Tensor) -> tuple[Tensor, float]:
        """Return (A v, W)."""
        with full_precision():
            # A tensor made in inference mode cannot enter a graph.
            vector = vector.clone() if vector.is_inference() else vector
            product, weight = self._unchecked_product(vector)
            if self._checking.is_due():
                self._check_product()
            return product, weight

    def _unchecked_product(self, vector: Tensor) -> tuple[Tensor, float]:
        if self._single is None or not self._can_keep or not self._fits(self._single):
            return self._rebuilt_product(vector)
        kept = self._kept_piece(self._single)
        try:
            return self._kept_product(kept, vector), kept.piece.weight
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
        # The graph saved a buffer that the forward pass writes to and that was put back: there is
        # nothing to keep.
        self.release()
        self._can_keep = False
        return self._rebuilt_product(vector)

    def _kept_piece(self, batch: Any) -> Kept:
        if self._kept is None or not self._kept.snapshot.is_current():
            self._kept = None  # the old graph goes before the new one comes
            check_present(self._model, self.names, self.parameters)
            snapshot = Snapshot(self._model, self.loss_fn, batch)
            with (
                measuring(self._model, self.norm_mode) as inner,
                self._differentiating(inner) as model,
            ):
                local = next(self._pieces(), None)
                if local is None:
                    raise HessianFlowError(NO_TARGET)
                if self._repeats.is_due():
                    self._repeats.compare(snapshot, self._mean_loss(model, [local]))
                with explained(num_examples(batch)), explaining_types(self._model, batch):
                    piece = self._prepare(model, local)
                counted(piece.weight)
            snapshot.renew()  # buffers that were written to have new versions, and their old values
            self._repeats.compare(snapshot, piece.loss)
            self._checking.note(piece.graph, piece.missing)
            self._kept = Kept(piece, snapshot, piece.graph.recomputes or bool(piece.graph.foreign))
        return self._kept

    def _kept_product(self, kept: Kept, vector: Tensor) -> Tensor:
        if not kept.recomputes:
            hooks = [parameter._backward_hooks for parameter in self.parameters]
            aside = without_hooks(hooks) if any(hooks) else nullcontext()
            with explained(num_examples(self._single)), aside:
                return kept.piece.product(vector)
        surroundings = measuring(self._model, self.norm_mode)
        with (
            surroundings as inner,
            self._differentiating(inner),
            explained(num_examples(self._single)),
        ):
            product = kept.piece.product(vector)
        kept.snapshot.renew()
        return product

    def _rebuilt_product(self, vector: Tensor) -> tuple[Tensor, float]:
        total, whole = torch.zeros_like(vector), 0.0
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        check_present(self._model, self.names, self.parameters)
        if self._snapshot is None or not self._snapshot.is_current():
            self._snapshot = Snapshot(self._model, self.loss_fn, self._single)
        with measuring(self._model, self.norm_mode) as inner, self._differentiating(inner) as model:
            if self._repeats.is_due():
                self._repeats.compare(self._snapshot, self._mean_loss(model, self._pieces(model)))
            for batch in self._pieces(model):
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
        return total.div_(whole), whole

    @contextmanager
    def _differentiating(self, model: nn.Module) -> Iterator[nn.Module]:
        """Enable second-order kernels and hold everything not selected constant; for use inside
        measuring().

        Yields:
            What to call.
        """
        selected = {id(p) for p in self.parameters}
        for parameter in model.parameters():
            if id(parameter) not in selected:
                parameter.requires_grad_(False)
        cheap = CheapDoubleBackward() if has_replacements(model) else nullcontext()
        with second_order(model), folded_normalisation(model) as folded, cheap:
            yield folded

    def _pieces(self, model: nn.Module | None = None) -> Iterator[Any]:
        """Yield what is forwarded at once, without pieces that are known to count for nothing.

        A piece counts for nothing where all its targets are ignored. If `model` is given, the first
        batch that is cut is checked with it.
        """
        for batch in checked_batches(self._batches):
            if model is not None and not self._is_cut_checked and not self._fits(batch):
                self._is_cut_checked = True
                if not isinstance(batch, Mapping):
                    check_cut(model, batch, self._local)
            for piece in split(batch, self.microbatch_size):
                local = self._local(piece)
                if self._weight_ahead(local) != 0:
                    yield local

    def _weight_ahead(self, batch: Any) -> float | None:
        # The host waits for a weight on the device: a piece of weight 0 must not be forwarded.
        weight = self._loss.weight_ahead(batch if isinstance(batch, Mapping) else batch[1])
        return None if weight is None else float(weight)

    def _fits(self, batch: Any) -> bool:
        return self.microbatch_size is None or num_examples(batch) <= self.microbatch_size

    def _local(self, batch: Any) -> Any:
        moved = move(batch, self.device, non_blocking=True)
        return map_tensors(lambda t: t.clone() if t.is_inference() else t, moved)

    def _averaged(self, model: nn.Module, batch: Any) -> Averaged:
        """Return the mean loss of one piece and its weight."""
        if isinstance(batch, Mapping):
            return self._average(model, batch)
        return self._average(model(batch[0]), batch[1])

    def _average(self, outputs: Any, targets: Any) -> Averaged:
        """Return the mean loss of a piece, from the model's outputs or, for a dict, from the model
        itself."""
        averaged = self._loss(outputs, targets)
        if self.is_part or self._single is None or not self._fits(self._single):
            self._check_split(outputs, targets)
        return averaged

    def _checked_loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        """Return the mean loss of one piece, fit to be differentiated, and its weight.

        A loss of weight 0 is not checked.
        """
        averaged = self._averaged(model, batch)
        loss, weight = averaged.value, float(averaged.weight)
        if weight > 0:
            check_finite(loss)
            if not loss.requires_grad:
                raise HessianFlowError(UNREACHED)
        return loss, weight

    def _mean_loss(self, model: nn.Module, pieces: Iterable[Any]) -> Tensor:
        total, whole = torch.zeros((), dtype=torch.float64, device=self.device), 0.0
        # With gradients enabled, as in a product: a loss may itself differentiate, by its inputs
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
        holders = [
            module for module in (self._model, self.loss_fn) if isinstance(module, nn.Module)
        ]
        with measuring(self._model, self.norm_mode) as inner, self._differentiating(inner) as model:
            whole = next(self._pieces())
            samples: list[Callable[[], Any]] = [lambda: whole]
            if not uses_batch_statistics(inner, self.norm_mode):
                samples.insert(0, lambda: next(split(whole, EXAMPLES)))
            found = find_disagreement(
                partial(self._linearised, model), holders, self.parameters, samples
            )
        self._checking.conclude(found, self.names)

    def _linearised(self, model: nn.Module, batch: Any, parameters: Sequence[Tensor]) -> Linearised:
        """Return what the graph of one batch claims, for other parameters than those selected."""
        twin = copy.copy(self)
        twin.parameters = tuple(parameters)
        twin.dtype = torch.float64
        claims = twin._prepare(model, batch).claims
        if claims is None:
            raise HessianFlowError(NO_TARGET)
        return claims()
