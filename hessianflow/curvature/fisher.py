"""The Fisher matrix, F = sum_n w_n g_n g_n^T / sum_n w_n, g_n the gradient of one example's loss.

With the labels of the data this is the empirical Fisher (the uncentred covariance of the
gradients); with labels sampled from the model's own softmax it is an unbiased estimate of the
Fisher information (Kunstner, Hennig, Balles, Limitations of the empirical Fisher approximation,
2019, discuss the difference). The weights are those of the mean loss: 1, or the class weight of the
example's own target, and 0 where the target is ignored. The rows g_n^T form a Jacobian J, so
F v = J^T (w * J v) / sum w.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hessianflow.batches import num_examples, take_rows
from hessianflow.checks import check_choice
from hessianflow.curvature.derivatives import inspect_graph
from hessianflow.curvature.differences import Linearised, Vectors
from hessianflow.curvature.ggn import KeptJacobian, PairOperator
from hessianflow.curvature.measurable import uses_batch_statistics
from hessianflow.curvature.pieces import Piece, check_finite
from hessianflow.curvature.selection import Selection
from hessianflow.interfaces import HessianFlowError, LossFn, NormMode
from hessianflow.losses import Averaged
from hessianflow.structure import tensors_in

Labels = Literal["data", "model"]

_STEPS = (-4658895280553007687, -7723592293110705685)  # of splitmix64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FisherOperator(PairOperator):
    """The Fisher matrix of a model over some data, positive semi-definite.

    Further arguments, attributes: :class:`~hessianflow.curvature.model_operator.ModelOperator`.

    Args:
        labels: "data": the empirical Fisher. "model": one label per example, drawn from
            softmax(outputs); the targets must be class indices and the loss the cross-entropy. The
            labels are the same in every product and for any microbatch size.
        seed: seed of the drawn labels.

    Raises:
        HessianFlowError: `labels` is neither, or at a product outputs or targets do not fit
            "model".
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
        labels: Labels = "data",
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            loss_fn,
            data,
            params=params,
            microbatch_size=microbatch_size,
            norm_mode=norm_mode,
            check_deterministic=check_deterministic,
            check_product=check_product,
        )
        check_choice("labels", labels, get_args(Labels))
        self._labels = labels
        self._seed = seed

    def _prepare(self, model: nn.Module, batch: Any) -> Piece:
        forwarded = self._forwarded(model, batch)
        loss = forwarded.averaged.value.detach()
        weight = float(forwarded.averaged.weight)
        if weight == 0:
            return Piece(loss, 0.0, torch.zeros_like)
        # The rows of the matrix are the examples, however the data are cut.
        self._check_split(*forwarded.arguments)
        # The weights are those of the data's own targets, also for drawn labels: an ignored example
        # stays ignored, and the mean is that of the Gauss-Newton matrix.
        outputs, targets = forwarded.arguments
        examples = self._example_losses(outputs, targets)
        weights = [float(example.weight) for example in examples]
        if self._labels == "model":
            targets = self._sampled(outputs, targets, batch)
            examples = self._example_losses(outputs, targets)
        counted = [n for n in range(len(examples)) if weights[n] > 0]
        losses = torch.stack([examples[n].value for n in counted])
        check_finite(losses)
        factors = losses.new_tensor([weights[n] for n in counted])
        factors /= factors.sum()
        graph = inspect_graph(losses)
        jacobian = KeptJacobian(losses, self.parameters, self.dtype)

        def product(vector: Tensor) -> Tensor:
            return jacobian.transposed(factors * jacobian.forward(vector))

        def along(vector: Tensor) -> tuple[Vectors, Vectors]:
            return [[jacobian.transposed(factors) @ vector], [jacobian.forward(vector)]], []

        def claims() -> Linearised:
            values = losses.detach()
            return Linearised(loss, [[factors @ values], [values]], [], along, graph.rounds)

        return Piece(loss, weight, product, claims, graph, jacobian.missing)

    def _example_losses(self, outputs: Any, targets: Any) -> list[Averaged]:
        """Return the loss of each example, with its graph.

        A loss that runs the model gets the model and a batch of one example at a time.
        """
        if not isinstance(outputs, nn.Module):
            total = len(outputs)
            rows = [slice(n, n + 1) for n in range(total)]
            pairs = [(outputs[one], take_rows(targets, one, total, "targets")) for one in rows]
            return [self._loss.mean(*pair) for pair in pairs]
        if uses_batch_statistics(outputs, self.norm_mode):
            raise HessianFlowError(
                "FisherOperator runs each example alone if the loss runs the model, but a layer"
                ' normalises by the batch: use norm_mode="eval", or pairs (inputs, targets)'
            )
        total = num_examples(targets)
        examples = [take_rows(targets, slice(n, n + 1), total) for n in range(total)]
        return [self._loss.mean(outputs, one) for one in examples]

    def _sampled(self, outputs: Any, targets: Any, batch: Any) -> Tensor:
        are_classes = isinstance(targets, Tensor) and not targets.is_floating_point()
        are_scores = isinstance(outputs, Tensor) and outputs.ndim == 2
        if not are_scores or not are_classes or targets.ndim != 1:
            raise HessianFlowError(
                "labels='model' needs outputs [N, classes] and class indices [N]; use labels='data'"
            )
        outputs = outputs.detach()
        draws = draws_by_content(batch, len(outputs), self._seed)
        cumulative = torch.softmax(outputs.double(), dim=1).cumsum(dim=1)
        labels = torch.searchsorted(cumulative, draws[:, None]).squeeze(1)
        # Rounding may leave the last sum below 1, and a draw above it.
        return labels.clamp(max=outputs.shape[1] - 1)


def draws_by_content(batch: Any, examples: int, seed: int) -> Tensor:
    """Return a uniform number in [0, 1) for each example, shape [examples], float64.

    It depends on the content of the example, not on its position: data may come in another order in
    every pass, and in batches of any size. Equal examples get equal numbers. Only tensors whose
    first dimension is the number of examples count. The seed is any whole number; each gives
    another sequence.

    The bits of each value are read as an integer and multiplied by an odd number that depends on
    its position in the example and on the seed; the sum, mixed once more, is as good as random. The
    arithmetic is modulo 2^64, exact on every device and for every order of summation. Zeros
    appended as padding change nothing.
    """
    tensors = tensors_in(batch)
    device = tensors[0].device
    seed = seed % 2**63
    total = torch.full((examples,), seed, dtype=torch.int64, device=device)
    for tensor in tensors:
        if tensor.ndim > 0 and len(tensor) == examples:
            total = _mixed(total + _sums(tensor, seed).to(device))
    # The upper 53 bits, as many as a float64 holds.
    return ((total >> 11) & (2**53 - 1)).double() / 2**53


def _sums(tensor: Tensor, seed: int) -> Tensor:
    dense = tensor.detach()
    if dense.layout != torch.strided:
        dense = dense.to_dense()
    rows = dense.reshape(len(dense), -1)
    if rows.is_complex():
        rows = torch.view_as_real(rows).reshape(len(rows), -1)
    if rows.is_floating_point():
        rows = rows.contiguous().view(_INTEGERS[rows.element_size()])
    positions = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    odd = _mixed(positions + _mixed(torch.tensor(seed, device=rows.device))) | 1
    sums: Tensor = (rows.to(torch.int64) * odd).sum(dim=1)
    return sums


def _mixed(values: Tensor) -> Tensor:
    """Return integers that look random; each depends on all bits of its value (splitmix64)."""
    for shift, factor in zip((30, 27), _STEPS, strict=True):
        values = (values ^ (_shifted(values, shift))) * factor
    mixed: Tensor = values ^ _shifted(values, 31)
    return mixed


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Return the values shifted right, with zeros coming in from the left."""
    shifted: Tensor = (values >> bits) & (2 ** (64 - bits) - 1)
    return shifted
