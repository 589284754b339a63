"""Gradients, losses and counts of all ranks made one, between the last backward pass and the optimizer.

With n_r of N examples on rank r and g_r the gradient of the mean loss over them, every rank gets sum_r (n_r / N) g_r:
the gradient of the mean loss over all examples, for equal, unequal and empty shares alike. Where a loss divides by
something other than the number of examples (class weights, ignored targets), that takes the place of n_r and N. Nothing
is exchanged while microbatches accumulate.

Gradients travel in buckets of a few MB, in the reverse order of the parameters. While the last backward pass runs, a
bucket leaves as soon as its last gradient is there, so that sums overlap with computing; buckets leave in one order on
all ranks. The model itself is not wrapped: curvature and attacks differentiate it without setting off any exchange.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hessianflow.distributed.reducers import GroupReducer
from hessianflow.interfaces import HessianFlowError

BUCKET_BYTES = 25 * 2**20
"""Largest bucket, unless one parameter is larger. Default of torch's DistributedDataParallel."""


@dataclass(frozen=True)
class BatchTotals:
    """One optimization batch over all ranks.

    Attributes:
        loss: mean over all its examples, a float64 scalar on the device.
        correct: hits over all its examples, an int64 scalar on the device; None where no rank counts them.
        examples: its size.
        flags: number of ranks that raised their flag.
    """

    loss: Tensor
    correct: Tensor | None
    examples: int
    flags: int


class GradientSynchronizer:
    """Makes every `.grad` the gradient of the mean loss over the examples of all ranks.

    A step is: `begin(examples)`; backward passes that leave in `.grad` the gradient of the mean over this rank's own
    examples (the last of them within `last_backward()`, for overlap); `finish(loss, correct)`; the optimizer's step.
    All ranks must take part in every step, one without examples by `begin(0)` and `finish(None, None)`.

    Afterwards `.grad` is a view of a buffer that the next step overwrites. A parameter that no rank used keeps None.

    Args:
        parameters: those to train, in the same order on all ranks.
        reducer: of the group.
        bucket_bytes: see :data:`BUCKET_BYTES`.

    Attributes:
        waited_seconds: time the host spent waiting for other ranks, in all. On a CUDA device, which waits by itself,
            this is not the device's.

    Raises:
        HessianFlowError: nothing to train; at a step: no examples on any rank, or a sparse gradient.
    """

    def __init__(
        self, parameters: Iterable[Tensor], reducer: GroupReducer, *, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        if not self._parameters:
            raise HessianFlowError("the model has no trainable parameter: there is nothing to synchronise")
        self._buckets = [_Bucket(group) for group in _grouped(self._parameters[::-1], bucket_bytes)]
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._arrived_in(bucket))  # type: ignore[no-untyped-call]
        self._device = self._parameters[0].device
        self._counts_hits = True
        self._overlapping = False
        self.waited_seconds = 0.0
        self.rejoin(reducer)

    def rejoin(self, reducer: GroupReducer) -> None:
        """Go on in another generation of the group; whatever was under way in the one before is dropped."""
        self._reducer = reducer
        self._launched = 0

    def begin(self, examples: int, *, weight: float | None = None, flag: bool = False) -> None:
        """Announce this rank's share of the next batch, 0 or more examples; returns at once.

        Args:
            examples: of this rank.
            weight: what this rank's mean loss counts for; default `examples`.
            flag: anything all ranks should know of at this step, such as a request to stop.
        """
        self._examples, self._weight = examples, float(examples if weight is None else weight)
        self._counts = torch.tensor([examples, self._weight, flag], dtype=torch.float64)
        self._await_counts: Callable[[], None] | None = self._reducer.start_sum(self._counts)
        self._launched = 0

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Within it every gradient is final as soon as it is computed, so that buckets may leave.

        May be entered again in the same step, when the pass failed (out of memory) and all were repeated: a bucket that
        had left before the failure holds the same numbers.
        """
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        if self._reducer.world_size > 1:
            self._total()  # waited for here, not in a hook, where the engine's thread would stand still
            self._overlapping = True
        try:
            yield
        finally:
            self._overlapping = False

    def finish(self, loss: Tensor | None, correct: Tensor | None) -> BatchTotals:
        """Wait until all gradients are those of the whole batch.

        Args:
            loss: mean over this rank's examples, a scalar; None without examples.
            correct: hits among this rank's examples; None without examples, or where they are not counted.

        Returns:
            What the batch gave over all ranks, the same on each.
        """
        examples, share, flags = self._total()
        if self._examples > 0:
            self._counts_hits = correct is not None
        figures = torch.zeros(2, dtype=torch.float64, device=self._device)
        if loss is not None:
            figures[0] = loss.detach() * share
        if correct is not None:
            figures[1] = correct
        self._exchange(figures)
        hits = figures[1].round().to(torch.int64) if self._counts_hits else None
        return BatchTotals(figures[0], hits, examples, flags)

    def _exchange(self, figures: Tensor) -> None:
        if self._reducer.world_size == 1:
            return
        used = torch.tensor([p.grad is not None for p in self._parameters], dtype=torch.int32)
        self._launch(len(self._buckets))
        waits = [self._reducer.start_sum(used), self._reducer.start_sum(figures)]
        began = time.perf_counter()
        for wait in [*(bucket.wait for bucket in self._buckets), *waits]:
            wait()
        self.waited_seconds += time.perf_counter() - began
        for bucket in self._buckets:
            bucket.show()
        for parameter, ranks in zip(self._parameters, used.tolist(), strict=True):
            if ranks == 0:
                parameter.grad = None

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
        """Send off the buckets up to `stop` that have not left yet."""
        for bucket in self._buckets[self._launched : stop]:
            bucket.gather(self._total()[1])
            bucket.wait = self._reducer.start_sum(bucket.flat)
        self._launched = max(self._launched, stop)

    def _total(self) -> tuple[int, float, int]:
        """Examples over all ranks, this rank's share in the mean loss, and flags raised."""
        if self._await_counts is not None:
            began = time.perf_counter()
            self._await_counts()
            self._await_counts = None
            self.waited_seconds += time.perf_counter() - began
        examples, weight, flags = self._counts.tolist()
        if examples == 0:
            raise HessianFlowError("a batch of 0 examples over all ranks has no mean loss: check the training data")
        # Where every target is ignored the mean is that of nothing: nan, as in one process.
        return int(examples), self._weight / weight if weight else math.nan, int(flags)


@dataclass
class _Bucket:
    """Some parameters, and one buffer whose views become their gradients."""

    parameters: Sequence[Tensor]
    missing: int = 0
    wait: Callable[[], None] = lambda: None
    flat: Tensor = field(init=False)
    views: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        first = self.parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), dtype=first.dtype, device=first.device)
        pieces = torch.split(self.flat, [p.numel() for p in self.parameters])
        self.views = [_shaped(piece, p) for piece, p in zip(pieces, self.parameters, strict=True)]

    def gather(self, weight: float) -> None:
        """Copy the gradients times `weight` into the buffer, and let its views take their place."""
        targets, gradients = [], []
        for parameter, view in zip(self.parameters, self.views, strict=True):
            gradient = parameter.grad
            if gradient is None:
                view.zero_()
            elif gradient.layout is not torch.strided:
                raise HessianFlowError("sparse gradients cannot be summed over ranks: build layers with sparse=False")
            else:
                targets.append(view)
                gradients.append(gradient)
        if targets:
            torch._foreach_copy_(targets, gradients)
        self.flat.mul_(weight)
        self.show()

    def show(self) -> None:
        """Let the buffer's views be the gradients."""
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view


def _shaped(piece: Tensor, parameter: Tensor) -> Tensor:
    """The piece with the parameter's shape and, if that is dense, its memory layout: optimizers then stay fast."""
    if parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return piece.as_strided(parameter.shape, parameter.stride(), piece.storage_offset())
    return piece.view(parameter.shape)


def _grouped(parameters: Sequence[Tensor], limit: int) -> list[list[Tensor]]:
    """Neighbours of one type and device, together at most `limit` bytes."""
    groups: list[list[Tensor]] = []
    size = 0
    for parameter in parameters:
        bytes_here = parameter.numel() * parameter.element_size()
        same = bool(groups) and (groups[-1][0].dtype, groups[-1][0].device) == (parameter.dtype, parameter.device)
        if not same or size + bytes_here > limit:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += bytes_here
    return groups
