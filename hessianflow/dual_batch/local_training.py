"""Local epochs of a worker: it receives weights, trains with its batch size, and returns weights.

Lu, Hong, Liu, Wu, "Hybrid dual-batch and cyclic progressive learning for efficient distributed
training", arXiv:2509.26092. As in the published code, a local epoch draws its examples from a fresh
shuffle of the whole training set and takes round(d / B) whole batches.

Deviation: a worker keeps its momentum when the resolution changes (the published code recompiles,
and loses it).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import count, islice
from operator import add
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hessianflow.batches import to_device
from hessianflow.control import WorkerPlan
from hessianflow.dual_batch.server import Weights
from hessianflow.interfaces import (
    BatchTransform,
    HessianFlowError,
    Progress,
    ResizableBatches,
    StepResult,
)
from hessianflow.normalisation.ghost import ghost_normalisation
from hessianflow.runs.optimizer_states import check_optimizer, keeping_options
from hessianflow.runs.states import restoring
from hessianflow.structure import entries, mapped, rebuilt
from hessianflow.training import checkpoint
from hessianflow.training.accumulate import GradientAccumulator


class FlatWeights:
    """All floating-point weights and buffers of a model, in its state's order, as one array."""

    def __init__(self, model: nn.Module) -> None:
        state = model.state_dict(keep_vars=True).values()
        self._tensors = [t for t in state if isinstance(t, Tensor) and t.is_floating_point()]

    def read(self) -> Weights:
        """Return a copy of the weights."""
        flat: Weights = torch.cat([t.detach().reshape(-1) for t in self._tensors]).cpu().numpy()
        return flat

    def check(self, weights: Tensor) -> None:
        """Refuse saved weights of another number or type."""
        kind = torch.from_numpy(self.read()).dtype
        shape = (sum(t.numel() for t in self._tensors),)
        if weights.shape != shape or weights.dtype != kind:
            raise HessianFlowError(
                f"the server's weights are {weights.dtype} of shape {list(weights.shape)} there, "
                f"{kind} of shape {list(shape)} here"
            )

    def write(self, weights: Weights) -> None:
        """Copy weights into the model."""
        # torch.tensor copies: arrays from an object store are read-only, and torch warns of those.
        flat = torch.tensor(weights, device=self._tensors[0].device)
        pieces = torch.split(flat, [t.numel() for t in self._tensors])
        with torch.no_grad():
            for tensor, piece in zip(self._tensors, pieces, strict=True):
                tensor.copy_(piece.view(tensor.shape))


@dataclass(frozen=True)
class Course:
    """The course of a run for one worker.

    Attributes:
        plan_at, rate_at: Functions that return the worker's plan (examples, batch size) and the
            learning rate of an epoch.
        worker, workers: Number of this worker, and how many there are.
        epochs: Epochs of the run.
    """

    plan_at: Callable[[int], WorkerPlan]
    rate_at: Callable[[int], float]
    worker: int
    workers: int
    epochs: int


class LocalTraining:
    """A worker as a :data:`~hessianflow.dual_batch.simulated_server.LocalEpoch`.

    Several workers of a simulation may share a model and its data: every local epoch begins with
    the weights that it is given and with a position in the data that depends only on the worker's
    number and its count of local epochs.

    Args:
        model: Model, which is trained in place.
        data: Whole training set, with an order for every epoch number.
        optimizer: Optimizer of this worker, over the model's parameters.
        accumulate: Accumulator of the model's gradients.
        transform: Transform that resizes the batches; None for full resolution throughout.
        course: Plans and learning rates of this worker.
        microbatch_size: Examples per forward pass; None for the whole batch.
        norm_batch_size: Examples normalised at once; None for those of the forward pass.

    Attributes:
        figures: Figures of the last local epoch: loss (mean), weight (its divisor), correct,
            counted, examples, steps, batch_size, seconds.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ResizableBatches,
        optimizer: Optimizer,
        accumulate: GradientAccumulator,
        transform: BatchTransform | None,
        course: Course,
        *,
        microbatch_size: int | None = None,
        norm_batch_size: int | None = None,
    ) -> None:
        self._model = model
        self._data = data
        self._optimizer = optimizer
        self._accumulate = accumulate
        self._transform = transform
        self._course = course
        self._microbatch_size = microbatch_size
        self._norm_batch_size = norm_batch_size
        self._flat = FlatWeights(model)
        self._device = next(model.parameters()).device
        self._next = 0
        self.figures: Mapping[str, float] = {}

    def __call__(self, weights: Weights, epoch: int) -> Weights:
        """Return what one local epoch from `weights`, as `epoch` has it, makes of them."""
        # A worker may begin another local epoch before the last push of the run arrives.
        epoch = min(epoch, self._course.epochs - 1)
        began = time.perf_counter()
        plan = self._course.plan_at(epoch)
        self._flat.write(weights)
        for group in self._optimizer.param_groups:
            group["lr"] = self._course.rate_at(epoch)
        local = max(self._next, epoch)
        self._next = local + 1
        results = list(self._steps(epoch, local * self._course.workers + self._course.worker, plan))
        whole = reduce(add, results)
        # Reading waits for the device, so that the clock is right and the sums can be read.
        new_weights = self._flat.read()
        weight = float(whole.weight)
        hits = whole.hits
        self.figures = {
            "loss": whole.total.item() / weight if weight else math.nan,
            "weight": weight,
            "correct": -1 if hits is None else int(hits.correct),
            "counted": 0 if hits is None else float(hits.counted),
            "examples": whole.rows,
            "steps": len(results),
            "batch_size": plan.batch_size,
            "seconds": time.perf_counter() - began,
        }
        return new_weights

    def state_dict(self) -> dict[str, Any]:
        """Return optimizer, loss scale (fp16) and count of local epochs; the server has weights."""
        return {
            "next": self._next,
            "optimizer": checkpoint.plain(self._optimizer.state_dict()),
            "loss_scale": self._accumulate.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of :meth:`state_dict`."""
        source = "the state of a worker in the checkpoint"
        with restoring(source), keeping_options(self._optimizer):
            check_optimizer(self._optimizer, state["optimizer"])
            self._next = state["next"]
            self._optimizer.load_state_dict(state["optimizer"])
            self._accumulate.scaler.load_state_dict(state["loss_scale"])

    def measure(self, epoch: int, batch_size: int, steps: int) -> list[float]:
        """Train `steps` steps of `batch_size` examples, and return the seconds of each.

        The steps have the resolution of `epoch`, and go through as many shuffles as they need. The
        last batch of a shuffle is trained on, but does not count if it has another size.

        Raises:
            HessianFlowError: A shuffle has no batch of this size.
        """
        seconds: list[float] = []
        for order in count(epoch):
            plan = WorkerPlan(False, (steps - len(seconds)) * batch_size, batch_size, 1.0, 0.0)
            timed = list(self._timed(self._steps(epoch, order, plan), batch_size))
            if not timed:
                raise HessianFlowError(
                    f"{self._data.num_examples} examples give no batch of {batch_size} to time: "
                    "use another --batch-size"
                )
            seconds += timed
            if len(seconds) == steps:
                break
        return seconds

    def _timed(self, results: Iterator[StepResult], batch_size: int) -> Iterator[float]:
        """Yield the seconds of each step that had `batch_size` examples."""
        began = time.perf_counter()
        for result in results:
            result.loss.item()  # a measurement must wait for the device
            now = time.perf_counter()
            if result.rows == batch_size:
                yield now - began
            began = now

    def _steps(self, epoch: int, order: int, plan: WorkerPlan) -> Iterator[StepResult]:
        """Train on the first batches of the shuffle numbered `order`."""
        start = {"epoch": order, "cursor": 0, "batch_size": plan.batch_size}
        self._data.load_state_dict({**self._data.state_dict(), **start})
        progress = Progress(epoch, 0, 0, self._data.num_examples, self._course.epochs)
        self._model.train()
        with ghost_normalisation(self._model, self._norm_batch_size):
            for batch in islice(self._data, plan.steps):
                inputs, targets = to_device(batch, self._device, non_blocking=True)
                if self._transform is not None:
                    inputs, targets = self._transform(inputs, targets, progress)
                result = self._accumulate((inputs, targets), self._microbatch_size)
                self._accumulate.scaler.step(self._optimizer)
                self._accumulate.scaler.update()
                yield result


def checkable(state: Any) -> Any:
    """Return a nested state with tensors in place of arrays, as checkpoints need it."""

    def checked(leaf: Any) -> Any:
        return torch.from_numpy(leaf.copy()) if isinstance(leaf, np.ndarray) else leaf

    return mapped(checked, state)


def with_arrays(state: Any) -> Any:
    """Return the argument of :func:`checkable` from its result; optimizers keep their tensors."""
    if isinstance(state, Mapping) and "optimizer" in state:
        return state
    if isinstance(state, Tensor):
        return state.numpy()
    values = entries(state)
    return state if values is None else rebuilt(state, [with_arrays(value) for value in values])
