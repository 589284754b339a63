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

from hessianflow.batches import take_rows
from hessianflow.checks import check_choice
from hessianflow.curvature.derivatives import inspect_graph
from hessianflow.curvature.differences import Linearised, Vectors
from hessianflow.curvature.draws import draws_by_content
from hessianflow.curvature.ggn import PairOperator
from hessianflow.curvature.jacobian import KeptJacobian
from hessianflow.curvature.pieces import Piece, check_finite
from hessianflow.curvature.selection import Selection
from hessianflow.interfaces import HessianFlowError, LossFn, NormMode
from hessianflow.losses import Averaged

Labels = Literal["data", "model"]


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
        outputs, targets = self._forward(model, batch)
        averaged = self._average(outputs, targets)
        loss = averaged.value.detach()
        weight = float(averaged.weight)
        if weight == 0:
            return Piece(loss, 0.0, torch.zeros_like)
        # The rows of the matrix are the examples, however the data are cut.
        self._check_split(outputs, targets)
        # The weights are those of the data's own targets, also for drawn labels: an ignored example
        # stays ignored, and the mean is that of the Gauss-Newton matrix.
        examples = [self._example_loss(outputs, targets, n) for n in range(len(outputs))]
        weights = [float(example.weight) for example in examples]
        if self._labels == "model":
            targets = self._sampled(outputs.detach(), targets, batch)
            examples = [self._example_loss(outputs, targets, n) for n in range(len(outputs))]
        counted = [n for n in range(len(outputs)) if weights[n] > 0]
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

    def _example_loss(self, outputs: Tensor, targets: Any, n: int) -> Averaged:
        target = take_rows(targets, slice(n, n + 1), len(outputs), "targets")
        return self._loss(outputs[n : n + 1], target)

    def _sampled(self, outputs: Tensor, targets: Any, batch: Any) -> Tensor:
        if (
            not isinstance(targets, Tensor)
            or targets.is_floating_point()
            or outputs.ndim != 2
            or targets.ndim != 1
        ):
            raise HessianFlowError(
                "labels='model' needs outputs [N, classes] and class indices [N]; use labels='data'"
            )
        draws = draws_by_content(batch, len(outputs), self._seed)
        cumulative = torch.softmax(outputs.double(), dim=1).cumsum(dim=1)
        labels = torch.searchsorted(cumulative, draws[:, None]).squeeze(1)
        # Rounding may leave the last sum below 1, and a draw above it.
        return labels.clamp(max=outputs.shape[1] - 1)
