"""What one worker of a parameter server does: pull weights, train its share in its batch size, hand
weights back.

Lu, Hong, Liu, Wu, "Hybrid dual-batch and cyclic progressive learning for efficient distributed
training", arXiv:2509.26092. As in the published code, a local epoch draws its examples from a fresh
shuffle of the whole training set and takes round(d / B) whole batches.

Deviation: a worker keeps its momentum when the resolution changes (the published code recompiles,
and loses it).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import count, islice
from operator import add
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hessianflow.batches import move
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
from hessianflow.training import checkpoint
from hessianflow.training.accumulate import GradientAccumulator


class FlatWeights:
    """All floating-point weights and buffers of a model as one array on the host, in the order of
    its state."""

    def __init__(self, model: nn.Module) -> None:
        state = model.state_dict(keep_vars=True).values()
        self._tensors = [t for t in state if isinstance(t, Tensor) and t.is_floating_point()]

    def read(self) -> Weights:
        """Return a copy."""
        flat: Weights = torch.cat([t.detach().reshape(-1) for t in self._tensors]).cpu().numpy()
        return flat

    def check(self, weights: Tensor) -> None:
        """Refuse saved weights of another number or type, or that are not finite.

        Raises:
            HessianFlowError: which of these.
        """
        kind = torch.from_numpy(self.read()).dtype
        shape = (sum(t.numel() for t in self._tensors),)
        if weights.shape != shape or weights.dtype != kind:
            raise HessianFlowError(
                f"the server's weights are {weights.dtype} of shape {list(weights.shape)} there, "
                f"{kind} of shape {list(shape)} here"
            )

    def write(self, weights: Weights) -> None:
        """Put them into the model, in place."""
        device = self._tensors[0].device
        # A copy: arrays from an object store cannot be written to, and torch warns of those.
        parts = torch.split(
            torch.tensor(weights, device=device), [t.numel() for t in self._tensors]
        )
        with torch.no_grad():
            for tensor, part in zip(self._tensors, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))


@dataclass(frozen=True)
class Course:
    """What a run asks of a worker at each epoch.

    Attributes:
        plan_at: its examples and batch size.
        rate_at: the learning rate.
        worker: its number.
        workers: how many there are.
        epochs: of the run.
    """

    plan_at: Callable[[int], WorkerPlan]
    rate_at: Callable[[int], float]
    worker: int
    workers: int
    epochs: int


class LocalTraining:
    """One worker's local epochs; a :data:`~hessianflow.dual_batch.simulated_server.LocalEpoch`.

    Several workers of a simulation may share a model and its data: every local epoch begins with
    the weights given and with a place in the data that follows from the worker's number and its
    count of local epochs alone.

    Args:
        model: trained in place.
        data: the whole training set; an order for every epoch number.
        optimizer: the worker's own, over the model's parameters.
        accumulate: gradients of that model.
        transform: resizes the batches; None: full resolution throughout.
        course: what to do when.
        microbatch_size: examples a forward pass; None: the whole batch.
        norm_batch_size: examples that batch normalisation sees at once; None: the forward pass.

    Attributes:
        figures: of the last local epoch: loss (mean), weight (what it divides by), correct,
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
        self._model, self._data, self._optimizer, self._accumulate = (
            model,
            data,
            optimizer,
            accumulate,
        )
        self._transform, self._course = transform, course
        self._microbatch_size, self._norm_batch_size = microbatch_size, norm_batch_size
        self._flat = FlatWeights(model)
        self._device = next(model.parameters()).device
        self._next = 0
        self.figures: Mapping[str, float] = {}

    def __call__(self, weights: Weights, epoch: int) -> Weights:
        """Train from `weights` at the rate, share, batch size and resolution of `epoch`."""
        # some are under way when the last push has come
        epoch = min(epoch, self._course.epochs - 1)
        began, plan = time.perf_counter(), self._course.plan_at(epoch)
        self._flat.write(weights)
        for group in self._optimizer.param_groups:
            group["lr"] = self._course.rate_at(epoch)
        local, self._next = max(self._next, epoch), max(self._next, epoch) + 1
        results = list(self._steps(epoch, local * self._course.workers + self._course.worker, plan))
        whole = reduce(add, results)
        # waits for the device, so that the clock may be read and the sums may leave it
        made = self._flat.read()
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
        return made

    def state_dict(self) -> dict[str, Any]:
        """Return optimizer, loss scale (fp16) and count of local epochs; the weights are the
        server's."""
        return {
            "next": self._next,
            "optimizer": checkpoint.plain(self._optimizer.state_dict()),
            "loss_scale": self._accumulate.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        source = "the state of a worker in the checkpoint"
        with restoring(source), keeping_options(self._optimizer):
            check_optimizer(self._optimizer, state["optimizer"])
            self._next = state["next"]
            self._optimizer.load_state_dict(state["optimizer"])
            if "loss_scale" in state:  # states of earlier versions hold none
                self._accumulate.scaler.load_state_dict(state["loss_scale"])

    def measure(self, epoch: int, batch_size: int, steps: int) -> list[float]:
        """Return seconds of each of `steps` steps of `batch_size` examples at the resolution of
        `epoch`; trains the model.

        Goes through as many shuffles as that takes; a last batch of another size is trained on, and
        not counted.

        Raises:
            HessianFlowError: a shuffle gives no batch of that size.
        """
        seconds: list[float] = []
        for order in count(epoch):
            plan = WorkerPlan(False, (steps - len(seconds)) * batch_size, batch_size, 1.0, 0.0)
            found = list(self._timed(self._steps(epoch, order, plan), batch_size))
            if not found:
                raise HessianFlowError(
                    f"{self._data.num_examples} examples give no batch of {batch_size} to time: "
                    "use another --batch-size"
                )
            seconds += found
            if len(seconds) == steps:
                break
        return seconds

    def _timed(self, results: Iterator[StepResult], batch_size: int) -> Iterator[float]:
        """Seconds that each step took, where it was one of `batch_size` examples."""
        began = time.perf_counter()
        for result in results:
            result.loss.item()  # waits for the device: this is a measurement
            now = time.perf_counter()
            if result.rows == batch_size:
                yield now - began
            began = now

    def _steps(self, epoch: int, order: int, plan: WorkerPlan) -> Iterator[StepResult]:
        """Train on the first batches of the shuffle numbered `order`."""
        place = {"epoch": order, "cursor": 0, "batch_size": plan.batch_size}
        self._data.load_state_dict({**self._data.state_dict(), **place})
        progress = Progress(epoch, 0, 0, self._data.num_examples, self._course.epochs)
        self._model.train()
        with ghost_normalisation(self._model, self._norm_batch_size):
            for batch in islice(self._data, plan.steps):
                inputs, targets = move(batch, self._device, non_blocking=True)
                if self._transform is not None:
                    inputs, targets = self._transform(inputs, targets, progress)
                result = self._accumulate((inputs, targets), self._microbatch_size)
                self._accumulate.scaler.step(self._optimizer)
                self._accumulate.scaler.update()
                yield result


def checkable(state: Any) -> Any:
    """Return a nested state with tensors in place of arrays: what a checkpoint may hold."""
    if isinstance(state, np.ndarray):
        return torch.from_numpy(state.copy())
    return _mapped(checkable, state)


def with_arrays(state: Any) -> Any:
    """Return the state that :func:`checkable` was made of; optimizer states keep their tensors."""
    if isinstance(state, Mapping) and "optimizer" in state:
        return state
    if isinstance(state, Tensor):
        return state.numpy()
    return _mapped(with_arrays, state)


def _mapped(function: Callable[[Any], Any], state: Any) -> Any:
    if isinstance(state, Mapping):
        return {key: function(value) for key, value in state.items()}
    if isinstance(state, Sequence) and not isinstance(state, str):
        return type(state)(function(value) for value in state)  # type: ignore[call-arg]
    return state
