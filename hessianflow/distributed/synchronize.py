"""Average gradients, losses and counts over all ranks, before the optimizer steps.

With n_r of N examples on rank r and g_r the gradient of the mean loss over them, every rank gets
sum_r (n_r / N) g_r, the gradient of the mean loss over all examples, for equal, unequal and empty
shards. If a loss divides by something other than the number of examples (class weights, ignored
targets), that replaces n_r and N. Nothing is exchanged while microbatches accumulate.

Gradients are sent in buckets of a few MB, in the reverse order of the parameters. During the last
backward pass, a bucket is sent as soon as its last gradient is ready, so that sums overlap with
computing; all ranks send buckets in the same order. The model itself is not wrapped: curvature and
attacks differentiate it without causing an exchange.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hessianflow.distributed.reducers import GroupReducer
from hessianflow.interfaces import BatchTotals, HessianFlowError, Hits

BUCKET_BYTES = 25 * 2**20
"""Largest bucket, unless one parameter is larger (torch's default for DistributedDataParallel)."""


class GradientSynchronizer:
    """Makes every `.grad` the gradient of the mean loss over the examples of all ranks.

    A step consists of `begin(examples)`; backward passes that leave in `.grad` the gradient of the
    mean over this rank's own examples (the last of them within `last_backward()`, for overlap);
    `finish(loss, hits)`; and the optimizer's step. All ranks must take part in every step; a rank
    without examples calls `begin(0)` and `finish(None, None)`.

    A parameter that no rank used keeps None as its gradient.

    Args:
        parameters: Parameters to train, in the same order on all ranks.
        reducer: Reducer of the group.
        bucket_bytes: Largest size of a bucket.

    Attributes:
        waited_seconds: Time that the host has spent waiting for other ranks. It does not include
            the time that a CUDA device waits.

    Raises:
        HessianFlowError: There is nothing to train. A step raises it if no rank has examples, or
            for a sparse gradient.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        reducer: GroupReducer,
        *,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        if not self._parameters:
            raise HessianFlowError(
                "the model has no trainable parameter: there is nothing to synchronise"
            )
        self._buckets = [_Bucket(group) for group in _grouped(self._parameters[::-1], bucket_bytes)]
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                hook = self._arrived_in(bucket)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        self._device = self._parameters[0].device
        self._counts_hits = True
        self._overlapping = False
        self.waited_seconds = 0.0
        self.rejoin(reducer)

    def rejoin(self, reducer: GroupReducer) -> None:
        """Continue in another generation of the group, and drop exchanges of the previous one."""
        self._reducer = reducer
        self._launched = 0
        self._reference = 1.0

    def begin(self, examples: int, *, weight: float | Tensor | None = None) -> None:
        """Announce this rank's shard of the next batch; nothing is exchanged yet.

        Args:
            examples: Number of this rank's examples, 0 or more.
            weight: Weight of this rank's mean loss; None for `examples`.
        """
        self._examples = examples
        if weight is None:
            weight = examples
        self._read_weight = _number(weight)
        self._launched = 0

    @contextmanager
    def last_backward(self, weight: float | Tensor | None = None) -> Iterator[None]:
        """Mark the pass in which every computed gradient is final, so that buckets may be sent.

        The context may be entered again in the same step, if the pass failed (out of memory) and
        all passes were repeated: a bucket sent before the failure holds the same numbers.

        Args:
            weight: Weight that replaces the announced one; a tensor on a GPU is not waited for
                here.
        """
        if weight is not None:
            self._read_weight = _number(weight)
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        self._overlapping = self._reducer.world_size > 1
        try:
            yield
        finally:
            self._overlapping = False

    def finish(
        self,
        loss: Tensor | None,
        hits: Hits | None,
        counts: Sequence[int] = (),
        means: Sequence[tuple[Tensor, float | Tensor]] = (),
    ) -> BatchTotals:
        """Wait until all gradients are those of the whole batch.

        Args:
            loss: Mean loss over this rank's examples, a scalar; None without examples.
            hits: Hits among this rank's examples; None without examples, or if hits are not
                counted.
            counts: Further numbers to sum over ranks, such as 1 for a request to stop; the same
                number of them on every rank.
            means: Further (mean, weight) pairs to average over ranks; the same number of them on
                every rank.

        Returns:
            The totals of the batch over all ranks, the same on each.
        """
        if self._examples > 0:
            self._counts_hits = hits is not None
        own = self._read_weight()
        used_here = (p.grad is not None for p in self._parameters)
        control = torch.tensor([self._examples, own, *counts, *used_here], dtype=torch.float64)
        figures = torch.zeros(3 + 2 * len(means), dtype=torch.float64, device=self._device)
        if loss is not None and own > 0:  # the mean of nothing is nan, and counts for nothing
            figures[0] = loss.detach() * own
        if hits is not None:
            figures[1] = hits.correct
            figures[2] = hits.counted
        for number, (mean, weight_of_mean) in enumerate(means, start=1):
            figures[2 * number + 1] = _counted(mean, weight_of_mean)
            figures[2 * number + 2] = weight_of_mean
        control, figures = self._exchange(control, figures)
        examples, weight, *rest = control.tolist()
        if examples == 0:
            raise HessianFlowError(
                "a batch of 0 examples over all ranks has no mean loss: check the training data"
            )
        # If every target is ignored there is nothing to learn: loss and gradient are 0, as in one
        # process.
        divisor = weight or 1.0
        self._settle(rest[len(counts) :], divisor)
        total_hits = None
        if self._counts_hits:
            total_hits = Hits(figures[1].round().to(torch.int64), figures[2])
        pairs = figures[3:].view(-1, 2)
        return BatchTotals(
            figures[0] / divisor,
            total_hits,
            int(examples),
            tuple(map(int, rest[: len(counts)])),
            tuple((pair[0] / pair[1].clamp_min(1e-300), pair[1]) for pair in pairs),
            weight,
        )

    def _exchange(self, control: Tensor, figures: Tensor) -> tuple[Tensor, Tensor]:
        """Sum gradients, counts (on the host) and figures (on the device) over ranks."""
        if self._reducer.world_size == 1:
            return control, figures
        self._launch(len(self._buckets))
        vectors = [control, figures]
        if self._device.type == "cpu":  # one sum instead of two
            vectors = [torch.cat(vectors)]
        waits = [bucket.wait for bucket in self._buckets]
        waits += [self._reducer.start_sum(vector) for vector in vectors]
        began = time.perf_counter()
        for wait in waits:
            wait()
        self.waited_seconds += time.perf_counter() - began
        return vectors[0][: len(control)], vectors[-1][-len(figures) :]

    def _settle(self, used: Sequence[float], weight: float) -> None:
        """Rescale the sums in the buffers to the mean over this batch, and copy it to `.grad`.

        They were scaled by the weight of the previous batch.
        """
        if self._reducer.world_size == 1:
            return
        for bucket in self._buckets:
            if weight != self._reference:
                bucket.flat.mul_(self._reference / weight)
            bucket.scatter()
        for parameter, ranks in zip(self._parameters, used, strict=True):
            if ranks == 0:
                parameter.grad = None
        self._reference = weight

    def _arrived_in(self, bucket: "_Bucket") -> Callable[[Tensor], None]:
        def arrived(_: Tensor) -> None:
            if self._overlapping:
                bucket.missing -= 1
                complete = self._launched
                while complete < len(self._buckets) and self._buckets[complete].missing == 0:
                    complete += 1
                self._launch(complete)

        return arrived

    def _launch(self, stop: int) -> None:
        """Send the buckets up to `stop` that have not been sent yet."""
        for bucket in self._buckets[self._launched : stop]:
            # The weight of all ranks is not known yet, but that of the previous batch is, and it
            # is mostly the same.
            bucket.gather(self._read_weight() / self._reference)
            bucket.wait = self._reducer.start_sum(bucket.flat)
        self._launched = max(self._launched, stop)


@dataclass
class _Bucket:
    """Some parameters, and one buffer in which their gradients are sent."""

    parameters: Sequence[Tensor]
    missing: int = 0
    wait: Callable[[], None] = lambda: None
    flat: Tensor = field(init=False)
    views: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        first = self.parameters[0]
        self.flat = torch.zeros(
            sum(p.numel() for p in self.parameters), dtype=first.dtype, device=first.device
        )
        pieces = torch.split(self.flat, [p.numel() for p in self.parameters])
        self.views = [_shaped(piece, p) for piece, p in zip(pieces, self.parameters, strict=True)]

    def gather(self, weight: float) -> None:
        """Copy the gradients times `weight` into the buffer."""
        if weight == 0:
            self.flat.zero_()
            return
        targets, gradients = [], []
        for parameter, view in zip(self.parameters, self.views, strict=True):
            gradient = parameter.grad
            if gradient is None:
                view.zero_()
            elif gradient.layout is not torch.strided:
                raise HessianFlowError(
                    "sparse gradients cannot be summed over ranks: build layers with sparse=False"
                )
            else:
                targets.append(view)
                gradients.append(gradient)
        if targets:
            torch._foreach_copy_(targets, gradients)
        self.flat.mul_(weight)

    def scatter(self) -> None:
        """Copy the buffer to the gradients."""
        # With views instead of copies, the gradients would be freed at every step, and the
        # allocator would return their pages to the system and fetch them again: 8 % of a step of
        # ResNet-20 on a CPU.
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        torch._foreach_copy_([p.grad for p in self.parameters], self.views)  # type: ignore[misc]


def _counted(mean: Tensor, weight: float | Tensor) -> Tensor | float:
    """Return mean * weight, and 0 for the mean of nothing, which may be nan."""
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, mean * weight, 0.0)
    return mean * weight if weight > 0 else 0.0


def _number(value: float | Tensor) -> Callable[[], float]:
    """Return a function that reads a number.

    A number on a GPU is sent to the host now, after the work in its queue, and awaited by the
    function.
    """
    if not isinstance(value, Tensor) or value.device.type != "cuda":
        number = float(value)
        return lambda: number
    landed = torch.empty((), dtype=value.dtype, pin_memory=True)
    landed.copy_(value, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def read() -> float:
        arrived.synchronize()
        return float(landed)

    return read


def _shaped(piece: Tensor, parameter: Tensor) -> Tensor:
    """Return the piece in the shape and memory layout of the parameter, so that copies are fast."""
    if parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return piece.as_strided(parameter.shape, parameter.stride(), piece.storage_offset())
    return piece.view(parameter.shape)


def _grouped(parameters: Sequence[Tensor], limit: int) -> list[list[Tensor]]:
    """Return groups of neighbours of one type and device, each of at most `limit` bytes."""
    groups: list[list[Tensor]] = []
    size = 0
    kind: tuple[torch.dtype, torch.device] | None = None
    for parameter in parameters:
        own_bytes = parameter.numel() * parameter.element_size()
        own_kind = (parameter.dtype, parameter.device)
        if own_kind != kind or size + own_bytes > limit:
            groups.append([])
            size = 0
            kind = own_kind
        groups[-1].append(parameter)
        size += own_bytes
    return groups
