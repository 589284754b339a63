"""The sum of gradients, losses and counts over ranks, between last backward pass and optimizer.

With n_r of N examples on rank r and g_r the gradient of the mean loss over them, every rank gets
sum_r (n_r / N) g_r: the gradient of the mean loss over all examples, for equal, unequal and empty
shares alike. Where a loss divides by something other than the number of examples (class weights,
ignored targets), that takes the place of n_r and N. Nothing is exchanged while microbatches
accumulate.

Gradients travel in buckets of a few MB, in the reverse order of the parameters. While the last
backward pass runs, a bucket leaves as soon as its last gradient is there, so that sums overlap with
computing; buckets leave in one order on all ranks. The model itself is not wrapped: curvature and
attacks differentiate it without setting off any exchange.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hessianflow.interfaces import AgreedError, HessianFlowError, Hits, StepResult
from hessianflow.interfaces.world import GroupReducer

BUCKET_BYTES = 25 * 2**20
"""Largest bucket, unless one parameter is larger. Default of torch's DistributedDataParallel."""


class GradientSynchronizer:
    """Makes every `.grad` the gradient of the mean loss over the examples of all ranks.

    A step is: `begin(examples)`; backward passes that leave in `.grad` the gradient of the mean
    over this rank's own examples (the last of them within `last_backward()`, for overlap);
    `finish(result)`; the optimizer's step. All ranks must take part in every step, one without
    examples by `begin(0)` and `finish()`. A parameter that no rank used keeps None as its gradient.

    Args:
        parameters: Parameters to train, in the same order on all ranks.
        reducer: Reducer of the group.
        bucket_bytes: Largest bucket, see :data:`BUCKET_BYTES`.

    Attributes:
        waited_seconds: Time that the host spent waiting for other ranks, in all. On a CUDA device,
            which waits by itself, this is not the device's.

    Raises:
        HessianFlowError: There is nothing to train; at a step, no rank has examples, or a gradient
            is sparse.
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
                parameter.register_post_accumulate_grad_hook(self._arrived_in(bucket))  # type: ignore[no-untyped-call]
        self._device = self._parameters[0].device
        self._overlapping = False
        self.waited_seconds = 0.0
        self.rejoin(reducer)

    def rejoin(self, reducer: GroupReducer) -> None:
        """Continue in another generation of the group, and drop what was under way before."""
        self._reducer = reducer
        self._launched = 0
        self._reference = 1.0

    def begin(self, examples: int, *, weight: float | Tensor | None = None) -> None:
        """Announce this rank's share of the next batch, without an exchange.

        The weight of its mean loss is the number of examples, possibly 0, unless it is given.
        """
        if weight is None:
            weight = examples
        self._examples = examples
        self._read_weight = _number(weight)
        self._launched = 0

    @contextmanager
    def last_backward(self, weight: float | Tensor | None = None) -> Iterator[None]:
        """Let buckets leave while active, since every gradient that is computed is final then.

        The context may be entered again in the same step, after the pass failed (out of memory) and
        all were repeated: a bucket that had left before the failure holds the same numbers. A
        weight replaces the announced one; if it is a tensor on a GPU, there is no wait for it here.
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
        self, own: StepResult | None = None, flags: Sequence[int] = ()
    ) -> tuple[StepResult, tuple[int, ...]]:
        """Wait until all gradients are those of the whole batch; return its result on every rank.

        The result of this rank's share is None without examples. Flags are further numbers, as many
        on every rank, whose sums are returned too, such as 1 for a request to stop.
        """
        nothing = StepResult(torch.zeros((), device=self._device), 0)
        own = own or nothing
        twins = own.twins or nothing
        control = torch.tensor(
            [
                self._examples,
                self._read_weight(),
                own.rows,
                twins.rows,
                own.rows > 0 and own.hits is None,
                own.failure is not None,
                *flags,
                *(parameter.grad is not None for parameter in self._parameters),
            ],
            dtype=torch.float64,
        )
        control, figures = self._exchange(control, self._figures(own, twins))
        examples, divisor, rows, twin_rows, uncounted, failures, *rest = control.tolist()
        if examples == 0:
            raise HessianFlowError(
                "a batch of 0 examples over all ranks has no mean loss: check the training data"
            )
        # If every target is ignored, loss and gradient are 0, as in one process.
        self._settle(rest[len(flags) :], divisor or 1.0)
        failure = own.failure
        if failures and failure is None:
            failure = AgreedError("another rank refuses the loss: it cannot be cut into parts")
        hits = None
        if rows and not uncounted:
            hits = Hits(figures[2].round().to(torch.int64), figures[3])
        of_twins = None
        if twin_rows:
            of_twins = StepResult(figures[4], figures[5], None, int(twin_rows))
        result = StepResult(
            figures[0], figures[1], hits, int(rows), int(examples), divisor, of_twins, failure
        )
        return result, tuple(map(int, rest[: len(flags)]))

    def _figures(self, own: StepResult, twins: StepResult) -> Tensor:
        """Return the sums of a result as a vector on the device, without waiting for it."""
        figures = torch.zeros(6, dtype=torch.float64, device=self._device)
        figures[0] = own.total.detach()
        figures[1] = own.weight
        if own.hits is not None:
            figures[2] = own.hits.correct
            figures[3] = own.hits.counted
        figures[4] = twins.total.detach()
        figures[5] = twins.weight
        return figures

    def _exchange(self, control: Tensor, figures: Tensor) -> tuple[Tensor, Tensor]:
        """Sum gradients, counts (on the host) and figures (on the device) over ranks."""
        if self._reducer.world_size == 1:
            return control, figures
        self._launch(len(self._buckets))
        vectors = [control, figures]
        if self._device.type == "cpu":
            vectors = [torch.cat(vectors)]
        waits = [bucket.wait for bucket in self._buckets]
        waits += [self._reducer.start_sum(vector) for vector in vectors]
        began = time.perf_counter()
        for wait in waits:
            wait()
        self.waited_seconds += time.perf_counter() - began
        return vectors[0][: len(control)], vectors[-1][-len(figures) :]

    def _settle(self, used: Sequence[float], weight: float) -> None:
        """Turn the sums, scaled by the last batch's weight, into this batch's mean, in `.grad`."""
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
        """Send the buckets up to `stop` that have not left yet."""
        for bucket in self._buckets[self._launched : stop]:
            # The weight of all ranks is not known yet; that of the last batch is mostly the same.
            bucket.gather(self._read_weight() / self._reference)
            bucket.wait = self._reducer.start_sum(bucket.flat)
        self._launched = max(self._launched, stop)


@dataclass
class _Bucket:
    """Some parameters, and one buffer in which their gradients travel."""

    parameters: Sequence[Tensor]
    missing: int = 0
    wait: Callable[[], object] = lambda: None
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
        # Views in place of copies would free the gradients at every step, and the allocator would
        # return their pages and fetch them again: 8 % of a step of ResNet-20 on a CPU.
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        torch._foreach_copy_([p.grad for p in self.parameters], self.views)  # type: ignore[misc]


def _number(value: float | Tensor) -> Callable[[], float]:
    """Return a function that reads a number; one on a GPU travels from now on, without a wait."""
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
    """Return the piece in the parameter's shape and, for fast copies, its channels-last layout."""
    if parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return piece.as_strided(parameter.shape, parameter.stride(), piece.storage_offset())
    return piece.view(parameter.shape)


def _grouped(parameters: Sequence[Tensor], limit: int) -> list[list[Tensor]]:
    """Return neighbours of one type and device in groups of at most `limit` bytes."""
    groups: list[list[Tensor]] = []
    size = 0
    for parameter in parameters:
        bytes_here = parameter.numel() * parameter.element_size()
        kind = (parameter.dtype, parameter.device)
        is_new = not groups or (groups[-1][0].dtype, groups[-1][0].device) != kind
        if is_new or size + bytes_here > limit:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += bytes_here
    return groups
