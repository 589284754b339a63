"""One optimizer step on one batch: transform, attack, gradient in microbatches, update; out of memory is survived."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.optim import Optimizer

from hessianflow.batches import move, num_examples
from hessianflow.interfaces import Adversary, Batch, BatchTransform, Decision, Progress
from hessianflow.measuring import unwrap
from hessianflow.training import checkpoint
from hessianflow.training.accumulate import BatchResult, GradientAccumulator
from hessianflow.training.microbatch import MicrobatchSize
from hessianflow.training.timing import Stopwatch


@dataclass
class TrainingStep:
    """The parts of a step, and their order.

    An out-of-memory error halves the microbatch and repeats the step as if it had not been tried: buffers, random
    generators and the adversary go back to where they were (they are kept only while a size has not yet gone through).
    """

    model: nn.Module
    optimizer: Optimizer
    accumulate: GradientAccumulator
    microbatch: MicrobatchSize
    adversary: Adversary | None
    transform: BatchTransform | None
    watch: Stopwatch
    device: torch.device
    max_grad_norm: float | None = None

    def __call__(self, batch: Batch, decision: Decision, progress: Progress) -> BatchResult:
        """Take the step; `decision` and `progress` are those before it."""
        with self.watch.part("training"):
            inputs, targets = move(batch, self.device, non_blocking=True)
            drawn = num_examples(targets)
            if self.transform is not None:
                inputs, targets = self.transform(inputs, targets, progress)
            result = self._gradient((inputs, targets), decision.adversarial_share)
            if self.max_grad_norm is not None:
                self.accumulate.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.accumulate.parameters, self.max_grad_norm)
            self.accumulate.scaler.step(self.optimizer)
            self.accumulate.scaler.update()
            if self.adversary is not None:
                self.adversary.after_step(self.model)
        # Progress counts examples drawn from the data, whatever the transform made of them.
        return replace(result, examples=drawn)

    def _gradient(self, batch: Batch, share: float) -> BatchResult:
        count = num_examples(batch[1])
        while True:
            size = self.microbatch.begin(count)
            undo = None if self.microbatch.is_proven else self._remember()
            try:
                result = self._try_gradient(batch, share, size)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
            else:
                self.microbatch.end(count)
                return result
            # Outside the handler, where the error no longer holds the failed pass's tensors.
            self.accumulate.clear()
            self.microbatch.out_of_memory(count)
            if undo is not None:
                undo()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _try_gradient(self, batch: Batch, share: float, size: int) -> BatchResult:
        inputs, targets = batch
        if self.adversary is not None and share > 0:
            with self.watch.part("adversary"), self.accumulate.autocast():
                inputs = self.adversary.perturb(self.model, inputs, targets, share, size)
        return self.accumulate((inputs, targets), size)

    def _remember(self) -> Callable[[], None]:
        buffers = [(b, b.detach().clone()) for b in unwrap(self.model).buffers()]
        generators = checkpoint.generator_states()
        stateful = [*self.accumulate.observers, *([] if self.adversary is None else [self.adversary])]
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
    """A GPU's error type, or the message of the processor's allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error) or "t allocate" in str(error)
