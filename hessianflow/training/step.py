"""One optimizer step on one batch: transform, attack, gradient in microbatches, update."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hessianflow.batches import (
    explaining_types,
    is_pair,
    num_examples,
    to_device,
    training_pair,
)
from hessianflow.interfaces import (
    BindsParameters,
    Exposure,
    HessianFlowError,
    Progress,
    Stateful,
    StepResult,
)
from hessianflow.measuring import unwrap
from hessianflow.structure import article, is_list
from hessianflow.training import checkpoint
from hessianflow.training.accumulate import GradientAccumulator
from hessianflow.training.checks import tell_parameters
from hessianflow.training.exposing import expose
from hessianflow.training.lookahead import Planned
from hessianflow.training.microbatch import MicrobatchSize
from hessianflow.training.optimizers import (
    TrainedParameters,
    gradients_wanted,
    wants_graph,
    without_closure,
)
from hessianflow.training.task import Methods, Task
from hessianflow.training.timing import Stopwatch


@dataclass
class TrainingStep:
    """Takes optimizer steps; all ranks take a step together, each on its part of the batch.

    An out-of-memory error halves the microbatch and repeats the step as if it had not been tried:
    buffers, random generators, observers and adversary go back to their states before it. These are
    kept only until a step with the present microbatch size has succeeded.
    """

    task: Task
    methods: Methods
    accumulate: GradientAccumulator
    microbatch: MicrobatchSize
    stopwatch: Stopwatch
    trained: TrainedParameters
    max_grad_norm: float | None

    def __post_init__(self) -> None:
        self.model = self.task.model
        self.optimizer = self.task.optimizer
        self.world = self.accumulate.world
        self.device = self.stopwatch.device
        backward = self.accumulate.backward
        tell_parameters(backward.observers, backward.parameters)
        self._wanted = gradients_wanted(self.optimizer)
        backward.create_graph = wants_graph(self.optimizer)
        self.news = ""
        name = type(self.optimizer).__name__
        scales = self.accumulate.scaler.is_enabled()
        if self._wanted != "before" and scales:
            raise HessianFlowError(
                f"{name} asks for several gradients a step, which loss scaling cannot follow: "
                'use precision="bf16" or "float32"'
            )
        if backward.create_graph and (scales or self.world.world_size > 1):
            raise HessianFlowError(
                f"{name} differentiates the gradient again, which it cannot where losses are scaled"
                ' or gradients are summed over ranks: use one process and precision="bf16" or'
                ' "float32"'
            )

    def load(self, batch: Any, progress: Progress) -> Any:
        """Return a batch, moved to the device and transformed; `progress` is that at its step."""
        with self.stopwatch.section("training"):
            loaded = to_device(batch, self.device, non_blocking=True)
            if self.accumulate.loss.takes_pair(loaded):
                loaded = training_pair(loaded)
            transform = self.methods.transform
            if transform is None or num_examples(loaded) == 0:
                return loaded
            if not is_pair(loaded):
                raise HessianFlowError(
                    f"the transform takes (inputs, targets), got {article(loaded)}: transform such"
                    " batches in the data set or in collate_fn instead"
                )
            inputs, targets = loaded
            made = transform(inputs, targets, progress)
        if not is_list(made) or len(made) != 2:
            raise HessianFlowError(
                f"the transform must return a pair (inputs, targets), got {article(made)}"
            )
        return made[0], made[1]

    def __call__(self, now: Planned, ahead: Planned | None) -> StepResult:
        """Take the step on `now`; start the attack on `ahead` with the weights before it."""
        with self.stopwatch.section("training"):
            self.follow()
            result = self._update(lambda: self._clipped_gradient(now, ahead))
            if self.accumulate.backward.create_graph:
                # Otherwise the graph of the gradients would live as long as they do.
                self.accumulate.backward.clear()
        return result

    def follow(self, *, replan: bool = False) -> None:
        """Train the parameters that model and optimizer name now; `news` says what changed.

        With `replan` all ranks continue from the same state, and may plan their sums again.

        Raises:
            HessianFlowError: more is trained on several ranks, or an observer cannot be told.
        """
        change = self.trained.ask()
        if change is None:
            return
        backward = self.accumulate.backward
        observers = backward.observers
        if self.world.world_size > 1 and change.added and not replan:
            raise HessianFlowError(
                f"{change.message}: on {self.world.world_size} ranks, whose gradients are summed by"
                " a plan made at the start, only freezing works: unfreeze before the trainer is"
                " built, or resume with it unfrozen"
            )
        deaf = [type(each).__name__ for each in observers if not isinstance(each, BindsParameters)]
        if deaf:
            raise HessianFlowError(
                f"{change.message}: the observer {deaf[0]} cannot be told whose gradients it is"
                " shown from now on: give it a bind(parameters), which is called at each change"
            )
        for parameter in (*change.added, *change.removed):
            parameter.grad = None
        backward.parameters = self.trained.current
        if replan or self.world.world_size == 1:
            self.world.attach(self.model, self.trained.current)
        tell_parameters(observers, self.trained.current)
        self.news = change.message
        if replan:
            self.news = ""

    def _update(self, gradient: Callable[[], StepResult]) -> StepResult:
        """Let the optimizer step on as many gradients as it wants; `gradient` fills `.grad`."""
        if self._wanted == "before":
            result = gradient()
            try:
                self.accumulate.scaler.step(self.optimizer)
            except Exception as error:  # Optimizer packages have errors of their own.
                explained = without_closure(self.optimizer, error)
                if explained is None:
                    raise
                raise explained from error
            self.accumulate.scaler.update()
            return result
        results: list[StepResult] = []
        if self._wanted == "both":
            results.append(gradient())

        def closure() -> Tensor:
            # Only the first gradient is at the weights of the step and concerns the observers.
            if not results:
                results.append(gradient())
                return results[0].loss
            with self.accumulate.unobserved():
                results.append(gradient())
            return results[-1].loss

        self.optimizer.step(closure)  # type: ignore[arg-type]
        return results[0]

    def _clipped_gradient(self, now: Planned, ahead: Planned | None) -> StepResult:
        # Progress counts the examples drawn: transform and adversary may change the number of rows.
        self.world.begin(now.examples)
        own = self._gradient(now, ahead)
        result = self.accumulate.reduce_over_ranks(own)
        if self.max_grad_norm is not None:
            self.accumulate.scaler.unscale_(self.optimizer)
            backward = self.accumulate.backward
            backward.refuse_sparse(
                [parameter.grad for parameter in backward.parameters],
                "max_grad_norm cannot clip",
                ", or leave max_grad_norm out",
            )
            nn.utils.clip_grad_norm_(backward.parameters, self.max_grad_norm)
        return result

    def _gradient(self, now: Planned, ahead: Planned | None) -> StepResult:
        count = num_examples(now.batch)
        clean = [entry for entry in (now, ahead) if entry is not None and entry.attacked is None]
        while True:
            size = self.microbatch.begin(count)
            undo: Callable[[], None] | None = None
            if not self.microbatch.is_proven:
                undo = self._remember()
            try:
                with explaining_types(self.model, now.batch):
                    result = self.accumulate.expose(self._expose(now, ahead, size), size)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error) or self.accumulate.paired:
                    raise  # Where passes are paired, the other ranks wait for this one.
            else:
                self.microbatch.end(count)
                return result
            # Outside the handler, where the error no longer holds the failed pass's tensors.
            self.accumulate.backward.clear()
            self.microbatch.out_of_memory(count)
            for entry in clean:
                entry.attacked = None
            if undo is not None:
                undo()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _expose(self, now: Planned, ahead: Planned | None, size: int) -> Exposure:
        """Return what to train on: start the attacks that are due, and wait for earlier ones."""
        adversary = self.methods.adversary
        if adversary is None:
            return Exposure(now.batch)
        with self.stopwatch.section("adversary"), self.accumulate.autocast():
            return expose(adversary, self.model, now, ahead, size)

    def _remember(self) -> Callable[[], None]:
        buffers = [(b, b.detach().clone()) for b in unwrap(self.model).buffers()]
        generators = checkpoint.generator_states()
        stateful: list[Stateful] = [*self.accumulate.backward.observers]
        if self.methods.adversary is not None:
            stateful.append(self.methods.adversary)
        states = [(part, copy.deepcopy(part.state_dict())) for part in stateful]

        def undo() -> None:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            checkpoint.restore_generators(generators)
            for part, state in states:
                part.load_state_dict(state)

        return undo


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether a GPU or the processor's allocator, which has no type for it, ran out."""
    text = str(error)
    of_processor = "not enough memory" in text or "t allocate" in text
    return isinstance(error, torch.OutOfMemoryError) or of_processor
