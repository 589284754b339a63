"""Curvature and growing batches in a loop of your own on Hugging Face's accelerate.

    from hessianflow.integrations.accelerate import AdaptiveBatch
    steering = AdaptiveBatch(accelerator, model, optimizer, batches, loss_fn, controller=...)
    for epoch in range(epochs):
        for inputs, targets in steering.batches:
            loss = loss_fn(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            steering.after_step(loss)

`batches` are `hf.data.AdaptiveBatches(..., device=accelerator.device)` and need no `prepare`. The
state is part of `accelerator.save_state()`, and the figures go to `accelerator.log`.
"""

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hessianflow.batches import to_device
from hessianflow.distributed import current_world
from hessianflow.integrations.hosts import check_host
from hessianflow.integrations.passes import Passes
from hessianflow.integrations.steering import (
    PROBE_EXAMPLES,
    Plan,
    Steering,
    check_one_controller,
    make_probe,
    probe_batch,
)
from hessianflow.interfaces import BatchController, HessianFlowError, LossFn, Shardable

check_host("accelerate", (1, 10), (2,))

from accelerate import Accelerator  # noqa: E402

HOST = "a loop on accelerate"


class AdaptiveBatch:
    """Measures the curvature, and lets a controller set batch size and learning rate.

    Readings are made after every pass over the data, or after every `every` examples, as long as
    the budget allows. The figures are "curvature/eigenvalue", "curvature/edge_share" (the share of
    the stable learning rate in use), "batch/size" and others.

    Every process gets its part of each batch. A new batch size takes effect with the very next
    batch, even in the middle of a pass, without restarting workers.

    Args:
        accelerator: The accelerator.
        model: The model, prepared or not.
        optimizer: Its optimizer, prepared or not.
        batches: `hf.data.AdaptiveBatches` or other batches whose size can change.
        loss_fn: loss_fn(outputs, targets), or loss_fn(model, batch) for a batch that is a dict.
        controller: Any controller of `hf.control` that needs only curvature, loss or learning rate.
            Its decision sets the first batch size. None only measures.
        every: Examples between two readings, which the controller counts as an epoch; None for one
            pass over the data.
        passes: Planned passes over the data, for controllers that ask how far the run has come.
        batch: The probe batch, the same on all processes; None for `probe_examples` of `batches`.
        probe_examples: Examples of the probe batch, if `batch` is None.
        options: Further options of :class:`hessianflow.curvature.CurvatureProbe`, such as `budget`
            (default: 1 % of the training).

    Attributes:
        batches: The batches, one pass for each iteration, with a length.

    Raises:
        HessianFlowError: The batches cannot change their size or be divided among processes,
            accumulation or another controller sets the batch size as well, or the controller needs
            a signal that such a loop does not give.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        batches: Any,
        loss_fn: LossFn,
        *,
        controller: BatchController | None = None,
        every: int | None = None,
        passes: float | None = None,
        batch: Any = None,
        probe_examples: int = PROBE_EXAMPLES,
        **options: Any,
    ) -> None:
        self._accelerator = accelerator
        self.batches = Passes(batches)
        self._steering = Steering(controller, every)
        if controller is not None:
            self._check_alone()
            self.batches.set_batch_size(controller.decision.batch_size)
        if not isinstance(batches, Shardable):
            raise HessianFlowError(
                f"{type(batches).__name__} cannot be divided among processes: it lacks"
                " set_shard(rank, world_size); use hf.data.AdaptiveBatches"
            )
        batches.set_shard(accelerator.process_index, accelerator.num_processes)
        if batch is None:
            batch = probe_batch(self.batches, probe_examples)
        batch = to_device(batch, accelerator.device)
        world = current_world(accelerator.device)
        probe = make_probe(
            accelerator.unwrap_model(model), loss_fn, batch, optimizer, world, controller, options
        )
        total = sys.maxsize
        if passes is not None:
            total = round(passes * self.batches.num_examples)
        plan = Plan(self.batches.num_examples, total, HOST)
        self._steering.start(plan, optimizer, probe, world)
        accelerator.register_for_checkpointing(self)

    @property
    def controller(self) -> BatchController | None:
        """Return the controller that sets the batch size; None if this object only measures."""
        return self._steering.controller

    def after_step(self, loss: Tensor | float | None = None) -> dict[str, float]:
        """Measure, decide and log after an update; return the figures, none after most updates.

        Args:
            loss: Mean loss of the batch on this process, for controllers that need it.
        """
        examples = self.batches.examples
        figures = self._steering.after_update(examples, loss)
        if self._steering.decision is not None:
            self.batches.set_batch_size(self._steering.decision.batch_size)
        if figures:
            self._accelerator.log(figures, step=examples)
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Return all state that later readings, decisions and batches depend on."""
        return {"steering": self._steering.state_dict(), "passes": self.batches.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, at its place in the data and at its batch size."""
        self._steering.load_state_dict(state["steering"])
        self.batches.load_state_dict(state["passes"])

    def _check_alone(self) -> None:
        """Refuse anything else that sets the batch size: accumulation or another AdaptiveBatch."""
        steps = self._accelerator.gradient_accumulation_steps
        if steps != 1:
            raise HessianFlowError(
                f"gradient_accumulation_steps={steps} and the controller both set the batch size:"
                " leave accumulation out, and call accelerator.backward for parts of a batch"
                " instead"
            )
        others = [
            other
            for other in self._accelerator._custom_objects
            if isinstance(other, AdaptiveBatch) and other.controller is not None
        ]
        check_one_controller([*others, self], "Accelerator")
