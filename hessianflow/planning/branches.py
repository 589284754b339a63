"""The critical batch, measured: a run is branched at several batch sizes, and losses compared.

Reference: Merrill et al., Critical batch size revisited, 2025 (arXiv:2505.23971). All branches
start from the same weights and the same state of the optimizer, and see the same examples in the
same order. The rate follows the batch by a rule. The largest batch whose loss stays close to that
of the smallest one is critical.

Our choices: losses are those of fixed training examples, and the last quarter of the measurements
is averaged. A training loss would compare weights of different age, as a large batch is evaluated
before its step. The excess over the loss of the smallest batch is a share of the loss at the start,
so that it keeps a meaning where losses fall to nothing. Branches are repeated on the examples of
other epochs, which tells their spread.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hessianflow.control.lr_scaling import LRRule, lr_factor
from hessianflow.data import AdaptiveBatches, DeviceBatches, TextBatches
from hessianflow.interfaces import Batch, HessianFlowError, LossFn
from hessianflow.training import AdaptiveBatchTrainer, Passes, Reporting, Schedule, evaluate
from hessianflow.training.divergence import DivergenceError

SMOOTHED = 0.25
"""Share of the measurements, from the end, of which the mean is taken. Our choice."""


@dataclass(frozen=True)
class Start:
    """Where branches start.

    Attributes:
        model: weights at the start of a branch.
        optimizer: optimizer of these weights, with the rates in force at `batch_size`.
        data: training examples in the order that a branch is to see.
        batch_size: batch size for which the rates are stated.
        loss_fn: loss function.
        evaluated: fixed examples whose loss is compared, as one pair or several.
        passes: settings of the forward and backward passes.
        norm_group: examples that batch normalisation sees at once, unless `passes` says otherwise.
    """

    model: nn.Module
    optimizer: Optimizer
    data: DeviceBatches | AdaptiveBatches | TextBatches
    batch_size: int
    loss_fn: LossFn
    evaluated: Batch | Iterable[Batch]
    passes: Passes
    norm_group: int


@dataclass(frozen=True)
class Branch:
    """One branch.

    Attributes:
        batch_size: examples per step.
        repeat: number of the repeat, which decides the examples.
        lr_factor: factor of the rates at the start.
        updates: optimizer steps.
        start_loss: loss before the first step.
        losses: losses measured at equal distances, infinite from a divergence on.
        loss: mean of the last quarter of them.
    """

    batch_size: int
    repeat: int
    lr_factor: float
    updates: int
    start_loss: float
    losses: tuple[float, ...]
    loss: float

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes by name; None stands for an infinite loss."""
        losses = [_or_none(loss) for loss in self.losses]
        return {**asdict(self), "losses": losses, "loss": _or_none(self.loss)}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "Branch":
        """Return the branch that :meth:`to_dict` wrote.

        Raises:
            HessianFlowError: An entry is missing or of another type.
        """
        try:
            losses = tuple(_or_infinite(loss) for loss in row["losses"])
            return cls(
                batch_size=int(row["batch_size"]),
                repeat=int(row["repeat"]),
                lr_factor=float(row["lr_factor"]),
                updates=int(row["updates"]),
                start_loss=float(row["start_loss"]),
                losses=losses,
                loss=_or_infinite(row["loss"]),
            )
        except (KeyError, TypeError, ValueError):
            raise HessianFlowError("a branch is damaged") from None


@dataclass(frozen=True)
class SizeResult:
    """The branches of one batch size.

    Attributes:
        batch_size: examples per step.
        lr_factor: factor of the rates at the start.
        updates: optimizer steps of a branch.
        loss: mean loss over repeats.
        excess: mean over repeats of the loss less that of the smallest size in the same repeat, as
            a share of the loss at the start.
        stderr: standard error of that mean; 0 with a single repeat.
    """

    batch_size: int
    lr_factor: float
    updates: int
    loss: float
    excess: float
    stderr: float


def branch(
    start: Callable[[int], Start],
    size: int,
    repeat: int,
    rule: LRRule,
    rounds: int,
    round_examples: int,
) -> Branch:
    """Train one branch, and return its losses.

    Args:
        start: returns the start of a repeat, with weights, optimizer and data of its own.
        size: examples per step; it must divide `round_examples`.
        repeat: number of the repeat.
        rule: how the rate follows the batch.
        rounds: number of measurements.
        round_examples: examples between two of them.
    """
    begun = start(repeat)
    factor = lr_factor(size, begun.batch_size, rule)
    for group in begun.optimizer.param_groups:
        group["lr"] = factor * group["lr"]
    before = evaluate(begun.model, begun.evaluated, begun.loss_fn).loss
    trainer = AdaptiveBatchTrainer(
        begun.model,
        Window(begun.data, size, round_examples),
        begun.evaluated,
        optimizer=begun.optimizer,
        loss_fn=begun.loss_fn,
        epochs=rounds,
        schedule=Schedule(reference_batch_size=begun.norm_group),
        passes=begun.passes,
        reporting=Reporting(show_progress=False),
    )
    with suppress(DivergenceError):  # the measurements that are missing count as infinite
        trainer.fit()
    rows = [row for row in trainer.records if row["kind"] == "epoch"]
    losses = [_finite(row["eval_loss"]) for row in rows]
    losses += [math.inf] * (rounds - len(losses))
    last = losses[-max(1, round(SMOOTHED * rounds)) :]
    updates = rounds * round_examples // size
    return Branch(size, repeat, factor, updates, before, tuple(losses), statistics.fmean(last))


class Window:
    """A stretch of training data in rounds of equal length, which ends in no smaller batch.

    A batch at the end of an epoch of the data goes on with the first examples of the next.

    Args:
        data: training data.
        batch_size: examples per batch.
        round_examples: examples of a round, which a trainer takes for an epoch.
    """

    def __init__(
        self,
        data: DeviceBatches | AdaptiveBatches | TextBatches,
        batch_size: int,
        round_examples: int,
    ) -> None:
        self._data = data
        self._batches: Iterator[Batch] = iter(())
        self.batch_size = batch_size
        self.num_examples = round_examples

    def set_batch_size(self, batch_size: int) -> None:
        """Set the batch size from the very next batch on."""
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Batch]:
        left = self.num_examples
        while left > 0:
            size = min(self.batch_size, left)
            yield self._draw(size)
            left -= size

    def _draw(self, size: int) -> Batch:
        pieces: list[Batch] = []
        missing = size
        while missing > 0:
            self._data.set_batch_size(missing)
            piece = next(self._batches, None)
            if piece is None:
                self._batches = iter(self._data)
                continue
            pieces.append(piece)
            missing -= len(piece[1])
        if len(pieces) == 1:
            return pieces[0]
        inputs, targets = zip(*pieces, strict=True)
        return torch.cat(inputs), torch.cat(targets)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data."""
        return self._data.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a position in the data."""
        self._data.load_state_dict(state)


def compared(branches: Sequence[Branch]) -> list[SizeResult]:
    """Return the results by size, each compared with the smallest size of the same repeats."""
    sizes = sorted({one.batch_size for one in branches})
    smallest = {one.repeat: one for one in branches if one.batch_size == sizes[0]}
    results = []
    for size in sizes:
        of_size = [one for one in branches if one.batch_size == size]
        excess = [_excess(one, smallest[one.repeat]) for one in of_size]
        stderr = 0.0
        if len(excess) > 1 and all(map(math.isfinite, excess)):
            stderr = statistics.stdev(excess) / math.sqrt(len(excess))
        first = of_size[0]
        results.append(
            SizeResult(
                batch_size=size,
                lr_factor=first.lr_factor,
                updates=first.updates,
                loss=statistics.fmean(one.loss for one in of_size),
                excess=statistics.fmean(excess),
                stderr=stderr,
            )
        )
    return results


def critical_size(results: Sequence[SizeResult], tolerance: float) -> int:
    """Return the largest size up to which every excess is within the tolerance."""
    critical = results[0].batch_size
    for result in results:
        if not result.excess <= tolerance:
            return critical
        critical = result.batch_size
    return critical


def crossing(results: Sequence[SizeResult], tolerance: float) -> float:
    """Return the size at which the excess passes the tolerance, on a line over the log of the size.

    It is infinite where no excess does.
    """
    before = results[0]
    for result in results[1:]:
        if not result.excess <= tolerance:
            if not math.isfinite(result.excess):
                return float(before.batch_size)
            share = (tolerance - before.excess) / (result.excess - before.excess)
            span = math.log(result.batch_size / before.batch_size)
            return before.batch_size * math.exp(share * span)
        before = result
    return math.inf


def _excess(one: Branch, smallest: Branch) -> float:
    if not (math.isfinite(one.loss) and math.isfinite(smallest.loss) and one.start_loss > 0):
        return math.inf
    return (one.loss - smallest.loss) / one.start_loss


def _finite(loss: Tensor | float) -> float:
    value = float(loss)
    if math.isnan(value):
        return math.inf
    return value


def _or_none(loss: float) -> float | None:
    if math.isfinite(loss):
        return loss
    return None


def _or_infinite(loss: Any) -> float:
    if loss is None:
        return math.inf
    return float(loss)
