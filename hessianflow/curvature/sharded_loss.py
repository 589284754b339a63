"""The mean loss of a model that FSDP2 (`fully_shard`) shards over ranks, and its gradient.

A second derivative would have to pass through the gathering of shards, which has none. Measurements
that need only forward passes and gradients work: vectors then hold the entries of this rank's
shards, and sums over all weights are sums over ranks. All ranks must measure together.

The loss is the mean over the examples of all ranks. Either each rank passes its own share, or all
pass the same batch: equal batches are recognised by their content and count once. FSDP averages
gradients over ranks, so each rank's loss is weighted by its share of the total weight, times the
number of ranks.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hessianflow.curvature.derivatives import UNREACHED
from hessianflow.curvature.hessian import HessianOperator
from hessianflow.curvature.operator import NonFiniteError
from hessianflow.curvature.pieces import counted
from hessianflow.curvature.staleness import fingerprint
from hessianflow.curvature.surroundings import second_order, without_hooks
from hessianflow.curvature.vectors import flatten
from hessianflow.interfaces import HessianFlowError, LossFn
from hessianflow.measuring import measuring, unwrap
from hessianflow.sharding import is_shard, own_part, sharded_by


def by_first_derivatives(
    model: nn.Module, loss_fn: LossFn, data: Any, **options: Any
) -> HessianOperator:
    """Return an operator from which no product will be asked, so that the model may be sharded."""
    make = HessianOperator
    if sharded_by(unwrap(model)) == "fully_shard":
        make = ShardedLoss
    return make(model, loss_fn, data, **options)


class ShardedLoss(HessianOperator):
    """The part of a HessianOperator that takes no second derivative, for a model in shards.

    See the module's description. `size` is the number of weights in this rank's shards.

    Raises:
        HessianFlowError: weights are not in shards, or in shards over a mesh of several dimensions.
            When measuring: the ranks pass different numbers of batches or microbatches.
    """

    takes_shards = True

    def __init__(self, model: nn.Module, loss_fn: LossFn, data: Any, **options: Any) -> None:
        _reshard(unwrap(model))
        super().__init__(model, loss_fn, data, **options)
        self._group = self._group_of_shards()
        self.size = sum(own_part(parameter).numel() for parameter in self.parameters)
        self.is_part = True

    @property
    def num_examples(self) -> int:
        """Return the number of examples of all ranks; reads the data once."""
        marks = [fingerprint(batch) for batch in self._data.pieces()]
        mark = zlib.crc32(repr(marks).encode())
        return int(_distinct(self._gathered([super().num_examples, mark])))

    def over_ranks(self, numbers: Tensor) -> Tensor:
        """Return the sum over ranks, with the same bits on all of them."""
        parts = [torch.empty_like(numbers) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(parts, numbers.contiguous(), group=self._group)
        return torch.stack(parts).sum(0)

    def paired(self, batches: Callable[[], Iterable[Any]]) -> Callable[[], Iterable[Any]]:
        """Return the batches, after checking that all ranks hold as many.

        Otherwise a rank with more batches would wait forever.
        """
        counts = self._gathered([sum(1 for _ in batches())])[:, 0]
        if len(set(counts.tolist())) > 1:
            numbers = ", ".join(str(int(number)) for number in counts)
            raise HessianFlowError(
                f"the ranks cut their examples into {numbers} pieces with targets that count: give"
                " every rank of a model sharded by fully_shard the same number of examples"
            )
        return batches

    def mean_loss(self) -> float:
        """Return the mean loss over the examples of all ranks at the current weights."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        pieces = self.paired(self._data.pieces)
        with self._sharded() as model, torch.no_grad():
            for batch in pieces():
                averaged = self._averaged(model, batch)
                weight = float(averaged.weight)
                if weight > 0:
                    total = averaged.value.double() * weight
                    sums += torch.stack([total, torch.full_like(total, weight)])
        total, whole = self.over_ranks(sums).tolist()
        return float(total / counted(whole))

    def weighted_gradient(self) -> tuple[Tensor, float]:
        """Return (W g, W) for this rank's shards of the gradient g, and W of all ranks."""
        parts = [own_part(parameter) for parameter in self.parameters]
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        whole = 0.0
        pieces = self.paired(self._data.pieces)
        with self._sharded() as model, self._gradients_kept():
            for batch in pieces():
                loss, weight = self._shared_loss(model, batch)
                if weight == 0:
                    continue
                loss.backward()  # type: ignore[no-untyped-call]
                held = [parameter.grad for parameter in self.parameters]
                gradients = [None if grad is None else own_part(grad) for grad in held]
                total.add_(flatten(gradients, parts, self.dtype), alpha=weight)
                for parameter in self.parameters:
                    parameter.grad = None
                whole += weight
        return total, whole

    def kept_gradient(self) -> Tensor:
        """Return this rank's shards of the gradient; no graph is kept."""
        return self.gradient()

    def _product(self, vector: Tensor) -> Tensor:  # noqa: ARG002
        raise HessianFlowError(
            "a model sharded by fully_shard (DTensor) has no Hessian product: use"
            ' form="forward" of critical_rate or form="simple" of noise_scale'
        )

    def _shared_loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        """Return this rank's part of the loss for FSDP's mean, and the total weight over ranks."""
        failure: HessianFlowError | None = None
        numbers = [math.nan] * 3
        try:
            averaged = self._averaged(model, batch)
            if not averaged.value.requires_grad:
                raise HessianFlowError(UNREACHED)
            weight = float(averaged.weight)
            value = 0.0
            if weight > 0:
                value = float(averaged.value.detach())
            numbers = [weight, fingerprint(batch), value]
        except HessianFlowError as error:
            failure = error  # raised after the exchange, since other ranks wait for this one
        rows = self._gathered(numbers)
        if failure is not None:
            raise failure
        self._check_rows(rows)
        weights = rows[:, 0]
        if float(weights.sum()) == 0:
            return averaged.value, 0.0
        share = weight * len(weights) / float(weights.sum())
        return averaged.value * share, _distinct(rows)

    def _check_rows(self, rows: Tensor) -> None:
        """Raise on all ranks if one cannot measure; the rows are [weight, fingerprint, loss]."""
        weights = rows[:, 0]
        if bool(weights.isnan().any()):
            raise HessianFlowError(
                "another rank cannot measure its part of the batch; its own message says why"
            )
        if not bool(rows.isfinite().all()):
            raise NonFiniteError(
                "the loss is not finite (nan or inf); look at the weights and the inputs"
            )
        if 0 in weights and bool(weights.any()):
            raise HessianFlowError(
                "no target counts in the microbatch of one rank, but targets of other ranks do:"
                " give every rank of a model sharded by fully_shard targets that count"
            )

    def _gathered(self, numbers: list[float]) -> Tensor:
        """Return the numbers of all ranks, shape [ranks, numbers], on the host."""
        own = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(rows, own, group=self._group)
        return torch.stack(rows).cpu()  # the host waits, because all ranks must go on or none

    @contextmanager
    def _sharded(self) -> Iterator[nn.Module]:
        """Yield the model in evaluation mode, with its weights in shards before and after."""
        # Weights that a forward pass left gathered would not follow when the shards are moved.
        _reshard(self._model)
        with measuring(self._model, self.norm_mode) as model, second_order(model):
            try:
                yield model
            finally:
                _reshard(self._model)

    @contextmanager
    def _gradients_kept(self) -> Iterator[None]:
        """Restore `.grad` afterwards, and let no hook step the weights in the meantime."""
        held = [(p, p.grad) for p in self._model.parameters()]
        hooks = [getattr(p, "_post_accumulate_grad_hooks", None) for p, _ in held]
        for parameter, _ in held:
            parameter.grad = None
        try:
            with without_hooks(hooks):
                yield
        finally:
            for parameter, gradient in held:
                parameter.grad = gradient

    def _group_of_shards(self) -> Any:
        meshes = {}
        for name, parameter in self._model.named_parameters():
            if not is_shard(parameter):
                raise HessianFlowError(
                    f"{name} is in no shard, but the model is sharded by fully_shard (DTensor):"
                    " shard all of its parameters"
                )
            meshes[parameter.device_mesh] = name  # type: ignore[attr-defined]
        mesh = next(iter(meshes))
        if len(meshes) > 1 or mesh.ndim > 1:
            raise HessianFlowError(
                "the DTensors of the model lie on a mesh of several dimensions (FSDP with tensor"
                " parallelism or copies), got " + ", ".join(map(str, meshes)) + "; measure with"
                " fully_shard over one dimension, or an unsharded copy"
            )
        return mesh.get_group()


def _distinct(rows: Tensor) -> float:
    """Return the sum of the ranks' first numbers; equal second numbers count only once."""
    return float(sum({mark: number for number, mark, *_ in rows.tolist()}.values()))


def _reshard(model: nn.Module) -> None:
    for module in model.modules():
        if sharded_by(module) == "fully_shard":
            module.reshard()  # type: ignore[operator]
