"""What the Hessian, the Gauss-Newton and the Fisher operator of a model share: data, weights, averages, care.

The operator is that of the mean loss over all examples, L(w) = 1/N sum_n loss(f(x_n; w), y_n): every piece that is
forwarded enters with what its mean divides by (:mod:`hessianflow.losses`: its examples; with class weights or ignored
targets their sum), so unequal batches and any microbatch size give the same matrix. Where that is a guess, the first
parts are compared with the whole.

One batch in one pass: its graph is built once and kept for all products (`release()` frees it), and built anew as soon
as a weight, a buffer or the batch has changed. Several batches, or microbatches: the graph of each piece is rebuilt in
every product, and memory does not depend on the number of pieces.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from hessianflow.batches import map_tensors, move, num_examples, split
from hessianflow.curvature.derivatives import explained, full_precision, second_order
from hessianflow.curvature.double_backward import CheapDoubleBackward, has_replacements
from hessianflow.curvature.operator import NonFiniteError, Operator
from hessianflow.curvature.selection import Selection, batches_of, checked_batches, select_parameters, single_batch
from hessianflow.curvature.vectors import flatten
from hessianflow.folding import folded_normalisation
from hessianflow.interfaces import HessianFlowError, LossFn, NormMode
from hessianflow.losses import Averaged, MeanLoss, SplitCheck
from hessianflow.measuring import measuring, unwrap


class Piece(NamedTuple):
    """One forwarded batch or microbatch.

    Attributes:
        loss: its mean, a detached scalar.
        weight: what that mean divides by; 0 where nothing counts.
        product: multiplies a vector with its matrix.
    """

    loss: Tensor
    weight: float
    product: Callable[[Tensor], Tensor]


NO_TARGET = "no target counts: all are ignored or of weight 0; look at ignore_index and weight"


class ModelOperator(Operator):
    """A curvature matrix of the mean loss of a model over some data.

    Args:
        model: any module; DataParallel, DistributedDataParallel and torch.compile wrappers are looked through.
        loss_fn: loss_fn(outputs, targets). Mean, sum (said by a `reduction` attribute), (sum, count) and per-example
            losses count alike, as the mean over what counts. For a batch that is a dict it is called as
            loss_fn(model, batch).
        data: one pair (inputs, targets), one dict, or a re-iterable of them (a list, a DataLoader without shuffled
            augmentation); told apart as in `batches.as_batches`. The model is called as model(inputs).
        params: trainable parameters to differentiate by: None for all, name patterns ("layer1", "*.bias"), or tensors.
        microbatch_size: examples per forward pass; None for whole batches with a kept graph.
        norm_mode: batch normalisation by running statistics ("eval") or by those of each batch ("batch").
        check_deterministic: run the model a second time when the first graph is kept, to see whether its loss repeats.

    Attributes:
        size: number of selected weights.
        dtype: of the vectors: that of the weights, but float32 for 16-bit models.
        names: names of the selected parameters, in the order of the flat vector.

    Raises:
        HessianFlowError: nothing trainable, no data, a bad option; at a product: a loss that is not finite
            (:class:`NonFiniteError`), cannot be differentiated twice, changes from one product to the next, or is not
            the weighted mean of its parts where the data are cut.
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
    ) -> None:
        self._model = unwrap(model)
        self.names, self.parameters = select_parameters(self._model, params)
        self.loss_fn = loss_fn
        self._loss = MeanLoss(loss_fn)
        self._check_split = SplitCheck(self._loss)
        self.norm_mode = norm_mode
        self.microbatch_size = microbatch_size
        self._check_deterministic = check_deterministic
        self._batches = batches_of(data)
        self._single = single_batch(self._batches)
        check_options(self._model, microbatch_size, norm_mode)
        self.size = sum(p.numel() for p in self.parameters)
        self.device = self.parameters[0].device
        self.dtype = _vector_dtype(self.parameters)
        self._position = 0  # examples of this pass before the piece at hand
        self._kept: tuple[Piece, _State] | None = None
        self._last_loss: tuple[_State, float] | None = None

    @abstractmethod
    def _prepare(self, model: nn.Module, batch: Any) -> Piece:
        """Run the model on one batch and return its loss and what multiplies with its matrix."""

    def weighted_product(self, vector: Tensor) -> tuple[Tensor, float]:
        """(W A v, W), W the :attr:`loss_weight` of the data held here: what microbatches add up, and ranks divide."""
        product, weight = self._mean_product(vector)
        return product * weight, weight

    def release(self) -> None:
        """Free the kept graph."""
        self._kept = None

    @property
    def num_examples(self) -> int:
        """Examples the loss is averaged over (reads the data once)."""
        return sum(num_examples(batch) for batch in checked_batches(self._batches))

    @property
    def loss_weight(self) -> float:
        """What the mean loss divides by: examples, or the sum of the class weights of the targets that count.

        Reads the data once, and runs the model on them where only the loss can tell.
        """
        if self._loss.is_known:
            return sum(self._weight_ahead(batch) or 0.0 for batch in self._pieces())
        with measuring(self._model, self.norm_mode) as inner, full_precision():
            return sum(float(self._averaged(inner, batch).weight) for batch in self._pieces())

    def mean_loss(self) -> float:
        """The loss whose curvature this is, at the current weights."""
        with measuring(self._model, self.norm_mode) as model, full_precision():
            return float(self._mean_loss(model, self._pieces()))

    def gradient(self) -> Tensor:
        """The gradient of the mean loss by the selected parameters, shape [size]."""
        total, whole = torch.zeros(self.size, dtype=self.dtype, device=self.device), 0.0
        with measuring(self._model, self.norm_mode) as inner, self._differentiating(inner) as model:
            for batch in self._pieces():
                loss, weight = self._checked_loss(model, batch)
                if weight == 0:
                    continue
                grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
                total.add_(flatten(grads, self.parameters, self.dtype), alpha=weight)
                whole += weight
        return total.div_(_counted(whole))

    def _product(self, vector: Tensor) -> Tensor:
        return self._mean_product(vector)[0]

    def _mean_product(self, vector: Tensor) -> tuple[Tensor, float]:
        """(A v, W)."""
        with full_precision():
            # A tensor made in inference mode cannot enter a graph.
            vector = vector.clone() if vector.is_inference() else vector
            if self._single is None or not self._fits(self._single):
                return self._rebuilt_product(vector)
            piece = self._kept_piece(self._single)
            with explained(num_examples(self._single)):
                return piece.product(vector), piece.weight

    def _kept_piece(self, batch: Any) -> Piece:
        state = _State(self._model, batch)
        if self._kept is None or not self._kept[1].matches(state):
            self._kept = None  # the old graph goes before the new one comes
            with measuring(self._model, self.norm_mode) as inner, self._differentiating(inner) as model:
                local = next(self._pieces(), None)
                if local is None:
                    raise HessianFlowError(NO_TARGET)
                with explained(num_examples(batch)):
                    piece = self._prepare(model, local)
                _counted(piece.weight)
                self._check_deterministic_once(model, state, [local])
            self._check_repeats(state, piece.loss)
            self._kept = (piece, state)
        return self._kept[0]

    def _rebuilt_product(self, vector: Tensor) -> tuple[Tensor, float]:
        total, whole = torch.zeros_like(vector), 0.0
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        state = _State(self._model, self._single)
        with measuring(self._model, self.norm_mode) as inner, self._differentiating(inner) as model:
            self._check_deterministic_once(model, state, self._pieces())
            for batch in self._pieces():
                with explained(num_examples(batch)):
                    piece = self._prepare(model, batch)
                    if piece.weight == 0:
                        continue
                    total.add_(piece.product(vector), alpha=piece.weight)
                loss += piece.loss.double() * piece.weight
                whole += piece.weight
        self._check_repeats(state, loss / _counted(whole))
        return total.div_(whole), whole

    @contextmanager
    def _differentiating(self, model: nn.Module) -> Iterator[nn.Module]:
        """Second-order kernels on, everything not selected a constant; to be used inside measuring().

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

    def _pieces(self) -> Iterator[Any]:
        """What is forwarded at once; pieces that are known to count for nothing (all targets ignored) are left out."""
        self._position = 0
        for batch in checked_batches(self._batches):
            for piece in split(batch, self.microbatch_size):
                local = self._local(piece)
                if self._weight_ahead(local) != 0:
                    yield local
                self._position += num_examples(piece)

    def _weight_ahead(self, batch: Any) -> float | None:
        # A weight on the device is awaited: a piece without one must not be forwarded.
        weight = self._loss.weight_ahead(batch if isinstance(batch, Mapping) else batch[1])
        return None if weight is None else float(weight)

    def _fits(self, batch: Any) -> bool:
        return self.microbatch_size is None or num_examples(batch) <= self.microbatch_size

    def _local(self, batch: Any) -> Any:
        moved = move(batch, self.device, non_blocking=True)
        return map_tensors(lambda t: t.clone() if t.is_inference() else t, moved)

    def _averaged(self, model: nn.Module, batch: Any) -> Averaged:
        """The mean loss of one piece and its weight."""
        if isinstance(batch, Mapping):
            return self._average(model, batch)
        return self._average(model(batch[0]), batch[1])

    def _average(self, outputs: Any, targets: Any) -> Averaged:
        """The mean loss of a piece from what the model returned; for a dict from the model itself."""
        averaged = self._loss(outputs, targets)
        if self._single is None or not self._fits(self._single):
            self._check_split(outputs, targets)
        return averaged

    def _checked_loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        """The mean loss of one piece, fit to be differentiated, and its weight; of weight 0 it is not looked at."""
        averaged = self._averaged(model, batch)
        loss, weight = averaged.value, float(averaged.weight)
        if weight > 0:
            check_finite(loss)
            if not loss.requires_grad:
                raise HessianFlowError("the loss does not depend on the selected parameters; is it detached?")
        return loss, weight

    def _mean_loss(self, model: nn.Module, pieces: Iterable[Any]) -> Tensor:
        total, whole = torch.zeros((), dtype=torch.float64, device=self.device), 0.0
        with torch.no_grad():
            for batch in pieces:
                with explained(num_examples(batch)):
                    averaged = self._averaged(model, batch)
                weight = float(averaged.weight)
                if weight > 0:
                    total += averaged.value.double() * weight
                    whole += weight
        return total / _counted(whole)

    def _check_deterministic_once(self, model: nn.Module, state: "_State", pieces: Iterable[Any]) -> None:
        # Products repeat each other's random numbers (measuring restores the generators), a kept graph its own: only a
        # second pass within one product shows that the loss is random.
        if self._check_deterministic and self._last_loss is None:
            self._check_repeats(state, self._mean_loss(model, pieces))

    def _check_repeats(self, state: "_State", loss: Tensor) -> None:
        # One number from the device per graph built: without it a random operator would pass for a matrix.
        value, tolerance = float(loss), torch.finfo(self.dtype).eps ** 0.5
        if self._last_loss is not None and self._last_loss[0].matches(state):
            before = self._last_loss[1]
            if abs(value - before) > tolerance * max(abs(value), abs(before)):
                raise HessianFlowError(
                    f"the loss changed from {before:.6g} to {value:.6g} between two products at the same weights; "
                    "switch off dropout and random augmentation in the data or in the model's forward"
                )
        self._last_loss = (state, value)


class _State:
    """What a graph was built from: places, versions and norms of weights and buffers, and versions of the batch."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        modules = list(model.modules())  # once: the names that parameters() and buffers() make cost more than the rest
        weights: list[Tensor] = [p for module in modules for p in module._parameters.values() if p is not None]
        watched = weights + [b for module in modules for b in module._buffers.values() if b is not None]
        map_tensors(lambda t: watched.append(t) or t, batch)  # type: ignore[func-returns-value]
        self._versions = [(t.data_ptr(), -1 if t.is_inference() else t._version) for t in watched]
        with torch.no_grad():
            # Writes through `.data` leave the version as it is, so the norms are compared too.
            norms = torch._foreach_norm(weights)
            self._norms = torch.stack([norm.to(weights[0].device) for norm in norms])  # compared in one transfer

    def matches(self, other: "_State") -> bool:
        # A comparison on the host is worth a synchronisation: the alternative is a product at forgotten weights.
        return self._versions == other._versions and torch.equal(self._norms, other._norms)


def check_finite(loss: Tensor) -> None:
    """Refuse a loss that is not finite.

    Raises:
        NonFiniteError: with what to look at.
    """
    # One synchronisation per graph built, so that no time goes into products of nan.
    if not bool(torch.isfinite(loss.detach()).all()):
        raise NonFiniteError("the loss is not finite (nan or inf); look at the weights and the inputs")


def _counted(weight: float) -> float:
    """The weight itself.

    Raises:
        HessianFlowError: it is 0.
    """
    if weight == 0:
        raise HessianFlowError(NO_TARGET)
    return weight


def check_options(model: nn.Module, microbatch_size: int | None, norm_mode: NormMode) -> None:
    """Refuse a way to run the (unwrapped) model that cannot be.

    Raises:
        HessianFlowError: an option out of range, or microbatches where each batch has its own statistics.
    """
    if norm_mode not in get_args(NormMode):
        raise HessianFlowError(f"norm_mode must be one of {', '.join(get_args(NormMode))}, got {norm_mode!r}")
    if microbatch_size is not None and microbatch_size < 1:
        raise HessianFlowError(f"microbatch_size must be at least 1 or None, got {microbatch_size}")
    normalises = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if norm_mode == "batch" and microbatch_size is not None and normalises:
        raise HessianFlowError(
            f"norm_mode='batch' needs each batch in one pass, got microbatch_size={microbatch_size}; "
            "leave it None or use norm_mode='eval'"
        )


def _vector_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    widest = torch.float32
    for parameter in parameters:
        widest = torch.promote_types(widest, parameter.dtype)
    return widest
