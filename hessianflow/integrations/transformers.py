"""Curvature and growing batches in the Trainer of Hugging Face.

`AdaptiveTrainer` is a `transformers.Trainer` whose batch size is set by a controller. A new size
takes effect with the very next update, without restarting workers:

    from hessianflow.integrations.transformers import AdaptiveTrainer as Trainer
    trainer = Trainer(..., controller=hf.control.ABSA(32, 512))

`CurvatureCallback` only measures, in a Trainer of any class:

    from hessianflow.integrations.transformers import CurvatureCallback
    trainer.add_callback(CurvatureCallback(trainer))

The figures go where the Trainer logs. Three things are left to the host: its progress bar keeps the
end that was planned at the start; `logging_steps`, `eval_steps` and `save_steps` count updates; and
its own samplers (`group_by_length`) are not used.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from hessianflow.batches import num_examples, split
from hessianflow.data import AdaptiveBatches
from hessianflow.integrations.passes import Passes
from hessianflow.integrations.transformers_callbacks import (
    ControlCallback,
    CurvatureCallback,
    model_loss,
)
from hessianflow.interfaces import BatchController, HessianFlowError
from hessianflow.measuring import measuring

from transformers import Trainer  # isort: skip

__all__ = ["AdaptiveBatchMixin", "AdaptiveTrainer", "CurvatureCallback", "model_loss"]


class AdaptiveBatchMixin:
    """A mixin to put before a class of Trainer, whose batch then follows a controller.

    The batch size counts the examples of an update over all processes. A new size takes effect with
    the very next update, even in the middle of a pass, without restarting workers. Processes run at
    most `per_device_train_batch_size` examples at a time, and the gradient is that of the whole
    batch. Its parts are weighted by the tokens that the host counts if the model divides by them
    (`num_items_in_batch`), and otherwise by the labels that are not -100.

    A run of `num_train_epochs` ends after that many passes, with fewer updates as the batch grows.
    The schedule of the learning rate then follows the examples, so that it ends with the run. With
    `max_steps`, the run takes exactly that many updates, and the schedule follows the updates.

    Args:
        controller: Any controller of `hf.control` that needs only curvature, loss or learning rate.
            Its decision sets the first batch size.
        every: Examples that the controller counts as an epoch; None for one pass over the data.
        curvature: Options of :class:`CurvatureCallback`: `loss_fn`, `batch`, `probe_examples`,
            `budget` and others.

    Raises:
        HessianFlowError: Something else sets the batch size as well: accumulation,
            `auto_find_batch_size` or another controller. When training begins: the data have no
            items by index, or the controller needs a signal that the Trainer does not give.
    """

    def __init__(
        self,
        *args: Any,
        controller: BatchController,
        every: int | None = None,
        curvature: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        own: Any = self  # has the attributes of the host as well
        self._control = ControlCallback(own, controller, every=every, **(curvature or {}))
        self.first_batch_size = controller.decision.batch_size
        self.last_loss: Tensor | None = None
        self.planned_updates = 0
        self._is_summed: bool | None = None
        self._check_arguments()
        own.add_callback(self._control)

    def get_train_dataloader(self) -> Passes:
        """Return the training data in batches of changing size, one pass for each iteration."""
        loader = super().get_train_dataloader()  # type: ignore[misc]
        args = self.args  # type: ignore[attr-defined]
        if isinstance(loader.dataset, IterableDataset):
            raise HessianFlowError(
                "AdaptiveTrainer needs a train_dataset with a length and items by index, got a"
                f" {type(loader.dataset).__name__}: load it whole, or train it with"
                " hf.AdaptiveBatchTrainer and hf.data.StreamBatches"
            )
        decision = self._control.steering.decision
        assert decision is not None
        batches = AdaptiveBatches(
            loader.dataset,
            decision.batch_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            device=args.device,
            collate_fn=loader.collate_fn,
        )
        batches.set_shard(args.process_index, args.world_size)
        self.passes = DatasetPasses(batches, loader.dataset, loader.collate_fn)
        return self.passes

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Plan as the host does, but allow as many passes as `max_steps` may need."""
        planned = list(super().set_initial_training_values(args, dataloader))  # type: ignore[misc]
        self.planned_updates = planned[-1]
        if args.max_steps > 0:
            planned[0] = args.max_steps  # a pass has at least one update
        return tuple(planned)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        """Resume at the place in the data; the host would compute it from one batch size."""
        start = super()._init_training_state(  # type: ignore[misc]
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return start  # type: ignore[no-any-return]
        self._control.load(resume_from_checkpoint)
        return self.passes.epoch, 0

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Add the gradient of a batch, one microbatch at a time, and return its mean loss."""
        if self._is_summed is None:
            self._is_summed = self._sums_over(model, inputs, num_items_in_batch)
            self.loss_is_scaled_for_ga = self._is_summed
        if not self._is_summed:
            num_items_in_batch = None
        step = super().training_step  # type: ignore[misc]
        accelerator = self.accelerator  # type: ignore[attr-defined]
        parts = list(split(inputs, self._train_batch_size))  # type: ignore[attr-defined]
        weights = [_weight(part) for part in parts]
        losses = []
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True), 1):
            # The host divides a mean loss by this number.
            self.current_gradient_accumulation_steps = sum(weights) / max(weight, 1)
            with nullcontext() if number == len(parts) else accelerator.no_sync(model):
                losses.append(step(model, part, num_items_in_batch))
        self.last_loss = torch.stack(losses).sum()
        return self.last_loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the host does, but with the learning rate that the last update used."""
        if "learning_rate" in logs:
            logs = {**logs, "learning_rate": logs["learning_rate"] * self._control.step_factor}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _sums_over(self, model: nn.Module, inputs: Any, num_items: Any) -> bool:
        """Return whether the loss is a sum over the items that the host counts.

        The host assumes so for every model that accepts the number of items. BERT and others ignore
        the number and return a mean, so the host's own accumulation would add up means. The loss is
        therefore measured with the number and with twice the number.
        """
        if num_items is None:
            return False
        accelerator = self.accelerator  # type: ignore[attr-defined]
        part = next(split(inputs, self._train_batch_size))  # type: ignore[attr-defined]
        prepared = self._prepare_inputs(part)  # type: ignore[attr-defined]
        with measuring(accelerator.unwrap_model(model)) as inner, torch.no_grad():
            context = self.compute_loss_context_manager()  # type: ignore[attr-defined]
            with context:
                once, half = (
                    float(
                        self.compute_loss(  # type: ignore[attr-defined]
                            inner, dict(prepared), num_items_in_batch=items
                        )
                    )
                    for items in (num_items, 2 * num_items)
                )
        return abs(once) > 1.5 * abs(half)

    def _check_arguments(self) -> None:
        args = self.args  # type: ignore[attr-defined]
        for name, neutral in (("gradient_accumulation_steps", 1), ("auto_find_batch_size", False)):
            value = getattr(args, name)
            if value != neutral:
                raise HessianFlowError(
                    f"{name}={value} and the controller both set the batch size: leave {name} out;"
                    " per_device_train_batch_size bounds the examples of a forward pass"
                )
        sampler = getattr(args, "train_sampling_strategy", "random")
        own = type(self)._get_train_sampler  # type: ignore[attr-defined]
        if sampler != "random" or own is not Trainer._get_train_sampler:
            raise HessianFlowError(
                "AdaptiveTrainer draws the examples itself, at random, and would not use"
                f" train_sampling_strategy={sampler!r} or a _get_train_sampler of your own: leave"
                " these out, or only measure, with CurvatureCallback"
            )


class AdaptiveTrainer(AdaptiveBatchMixin, Trainer):  # type: ignore[misc]
    """A `transformers.Trainer` whose batch follows a controller: :class:`AdaptiveBatchMixin`."""


class DatasetPasses(Passes):
    """Passes with the data set and the collate function, which the host looks for.

    Attributes:
        dataset: The data set.
        collate_fn: Function that makes a batch from a list of items.
    """

    def __init__(self, batches: Any, dataset: Any, collate_fn: Any) -> None:
        super().__init__(batches)
        self.dataset = dataset
        self.collate_fn = collate_fn


def _weight(batch: Any) -> int:
    """Return the number of items in the mean loss of a batch: its labels other than -100."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim < 2 or labels.is_floating_point():
        return num_examples(batch)
    return int(labels.ne(-100).sum())  # waits for the device, unless the batch is on the CPU
