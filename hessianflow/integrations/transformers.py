"""Curvature and growing batches in the Trainer of Hugging Face.

`AdaptiveTrainer` is a `transformers.Trainer` whose batch a controller sets, from the very next
update on, without a restart of workers:

    from hessianflow.integrations.transformers import AdaptiveTrainer as Trainer
    trainer = Trainer(..., controller=hf.control.ABSA(32, 512))

`CurvatureCallback` only measures, in a Trainer of any class:

    from hessianflow.integrations.transformers import CurvatureCallback
    trainer.add_callback(CurvatureCallback(trainer))

The figures go where the Trainer logs. What the host fixes: its progress bar ends where it was said
at the start to end, `logging_steps`, `eval_steps` and `save_steps` count updates, and a sampler of
its own (`group_by_length`) is not used.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hessianflow.batches import num_examples, split, to_device
from hessianflow.data import AdaptiveBatches
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
from hessianflow.interfaces import BatchController, HessianFlowError, LossFn
from hessianflow.measuring import measuring

check_host("transformers", (5, 24), (6,))

from transformers import Trainer, TrainerCallback  # noqa: E402

HOST = "the Trainer of transformers"
STATE_FILE = "hessianflow.pt"
"""Name of the file of this package in a checkpoint of the Trainer."""


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the loss that a model of transformers computes of a batch that holds its labels."""
    outputs = model(**batch)
    loss: Tensor = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
    return loss


class CurvatureCallback(TrainerCallback):  # type: ignore[misc]
    """Measures the curvature during the training of a Trainer, and logs it there.

    A reading is made after every pass over the data, or every so many examples, as far as the
    budget lasts. The figures are "curvature/eigenvalue", "curvature/edge_share" (the share of the
    stable learning rate in use) and others. The state is kept in the Trainer's checkpoints.

    Args:
        trainer: The Trainer.
        every: Training examples between two readings; None: one pass over the data.
        loss_fn: loss_fn(model, batch) of the measured loss; None for the loss of the model itself.
        batch: The probe batch; None for `probe_examples` of the training set.
        probe_examples: See `batch`.
        options: Further options of :class:`hessianflow.curvature.CurvatureProbe`, such as `budget`
            (default: 1 % of the training).

    Raises:
        HessianFlowError: When training begins: an option is out of range, or the data have no items
            to take a probe batch of.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        every: int | None = None,
        loss_fn: LossFn = model_loss,
        batch: Any = None,
        probe_examples: int = PROBE_EXAMPLES,
        **options: Any,
    ) -> None:
        self._trainer = trainer
        self._loss_fn = loss_fn
        self._batch = batch
        self._probe_examples = probe_examples
        self._options = options
        self.steering = Steering(None, every)
        self._is_loaded = False

    @property
    def controller(self) -> BatchController | None:
        """Return the controller that sets the batch; None if this only measures."""
        return self.steering.controller

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the probe of the model that is trained."""
        del control
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.global_step and not self._is_loaded and (folder / STATE_FILE).is_file():
            self.load(folder)
        self._is_loaded = False
        loader = kwargs["train_dataloader"]
        optimizer = kwargs["optimizer"]
        batch = self._batch
        if batch is None:
            batch = probe_batch(loader, self._probe_examples)
        world = current_world(args.device)
        probe = make_probe(
            kwargs["model"],
            self._loss_fn,
            to_device(batch, args.device),
            optimizer,
            world,
            self.controller,
            self._options,
        )
        self.steering.start(self._plan(args, state, loader), optimizer, probe, world)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, decide and log."""
        del kwargs
        figures = self.steering.after_update(self.examples(args, state), self.last_loss())
        if figures:
            due = control.should_log
            self._trainer.log(figures)
            control.should_log = due  # to log clears it, and the host's own figures would be lost

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the optimizer as it was."""
        del args, state, control, kwargs
        self.steering.finish()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state beside that of the Trainer."""
        del control, kwargs
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and folder.is_dir():
            torch.save(self.state_dict(), folder / STATE_FILE)

    def load(self, folder: str | Path) -> None:
        """Read the state from a checkpoint of the Trainer.

        Raises:
            HessianFlowError: It holds none.
        """
        path = Path(folder, STATE_FILE)
        if not path.is_file():
            raise HessianFlowError(
                f"{folder} holds no {STATE_FILE}: it was not saved by this trainer, so the batch"
                " and the place in the data are not known"
            )
        self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self._is_loaded = True

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later readings depend on."""
        return {"steering": self.steering.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.steering.load_state_dict(state["steering"])

    def examples(self, args: Any, state: Any) -> int:
        """Return the training examples used so far: the host counts updates of one size."""
        size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return int(state.global_step * size)

    def last_loss(self) -> Tensor | None:
        """Return the mean loss of the last update; None where it is not known."""
        return None

    def _plan(self, args: Any, state: Any, loader: Any) -> Plan:
        total = state.max_steps * args.train_batch_size * args.gradient_accumulation_steps
        total *= args.world_size
        length = getattr(getattr(loader, "dataset", None), "__len__", None)
        return Plan(total if length is None else length(), total, HOST)


class ControlCallback(CurvatureCallback):
    """Lets a controller set the batch of an :class:`AdaptiveTrainer`, which makes it."""

    def __init__(
        self, trainer: "AdaptiveBatchMixin", controller: BatchController, **options: Any
    ) -> None:
        every = options.pop("every", None)
        super().__init__(trainer, **options)  # type: ignore[arg-type]
        self.steering = Steering(controller, every)
        self._adaptive = trainer
        self._scheduled = 0  # steps of the schedule
        self.step_factor = 1.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that nothing else sets the batch, and make the probe."""
        sets = [
            callback
            for callback in self._trainer.callback_handler.callbacks
            if isinstance(callback, ControlCallback)
        ]
        check_one_controller(sets, "Trainer")
        super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure and decide; then correct what the host counts in updates of the first size."""
        passes = self._adaptive.passes
        state.epoch = passes.examples / passes.num_examples
        assert self.steering.rate is not None
        self.step_factor = self.steering.rate.factor
        super().on_step_end(args, state, control, **kwargs)
        decision = self.steering.decision
        assert decision is not None
        passes.set_batch_size(decision.batch_size)
        self._scheduled += 1
        if args.max_steps > 0:
            return
        self._advance(kwargs["lr_scheduler"], passes.examples / self._planned(args))
        state.max_steps = state.global_step + self._updates_left(args)
        if passes.examples >= self._planned(args):
            control.should_training_stop = True

    def examples(self, args: Any, state: Any) -> int:
        """Return the training examples used so far, over all ranks."""
        del args, state
        return self._adaptive.passes.examples

    def last_loss(self) -> Tensor | None:
        """Return the mean loss of the last update."""
        return self._adaptive.last_loss

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later readings, decisions and batches depend on."""
        passes = self._adaptive.passes.state_dict()
        return {**super().state_dict(), "passes": passes, "scheduled": self._scheduled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, at its place in the data and with its batch."""
        if "passes" not in state:
            raise HessianFlowError(
                "the checkpoint was made without a controller: resume without one, or start a new"
                " run"
            )
        super().load_state_dict(state)
        self._scheduled = state["scheduled"]
        self._adaptive.passes.load_state_dict(state["passes"])

    def _plan(self, args: Any, state: Any, loader: Any) -> Plan:
        del state, loader
        passes = self._adaptive.passes
        self._planned_updates = self._adaptive.planned_updates
        total = self._planned(args)
        if args.max_steps > 0:
            total = args.max_steps * self._adaptive.first_batch_size  # as far as is known
        return Plan(passes.num_examples, total, HOST)

    def _planned(self, args: Any) -> int:
        return round(args.num_train_epochs * self._adaptive.passes.num_examples)

    def _advance(self, scheduler: Any, done: float) -> None:
        """Let the schedule follow the examples: the host steps it once an update.

        Args:
            scheduler: The host's schedule, which ends after the updates planned at the first size.
            done: Share of the run's examples that were used.
        """
        if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
            return
        while self._scheduled < int(done * self._planned_updates + 1e-9):
            scheduler.step()
            self._scheduled += 1

    def _updates_left(self, args: Any) -> int:
        """Return the updates until the planned examples are used, at the present size."""
        passes = self._adaptive.passes
        left = self._planned(args) - passes.examples
        in_pass = min(left, -passes.examples % passes.num_examples)
        whole, part = divmod(left - in_pass, passes.num_examples)
        updates = -(-in_pass // passes.batch_size) + -(-part // passes.batch_size)
        return updates + whole * -(-passes.num_examples // passes.batch_size)


class AdaptiveBatchMixin:
    """A mixin before a class of Trainer, whose batch then follows a controller.

    The batch counts examples of an update over all processes, and changes from the very next update
    on, in the middle of a pass as well; workers continue. Processes run at most
    `per_device_train_batch_size` examples at a time, and the gradient is that of the whole batch:
    by the tokens that the host counts where the model divides by them (`num_items_in_batch`), else by
    the labels that are not -100.

    A run of `num_train_epochs` ends after that many passes, with fewer updates as the batch grows,
    and the schedule of the learning rate follows the examples, so that it ends with the run. With
    `max_steps` the run takes exactly so many updates, and the schedule follows these.

    Args:
        controller: Any of `hf.control` that needs curvature, loss or learning rate alone. Its
            decision is the first batch.
        every: Examples of what the controller calls an epoch; None: one pass over the data.
        curvature: Options of :class:`CurvatureCallback`: `loss_fn`, `batch`, `probe_examples`,
            `budget`, ...

    Raises:
        HessianFlowError: Something else sets the batch as well: accumulation, `auto_find_batch_size`
            or another controller; later: the data have no items by index, or the controller needs
            what the Trainer does not show.
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
        self._control = ControlCallback(self, controller, every=every, **(curvature or {}))
        self.first_batch_size = controller.decision.batch_size
        self.last_loss: Tensor | None = None
        self.planned_updates = 0
        self._is_summed: bool | None = None
        self._check_arguments()
        self.add_callback(self._control)  # type: ignore[attr-defined]

    def get_train_dataloader(self) -> Passes:  # type: ignore[misc]
        """Return the training data in batches of changing size, one pass for each iteration."""
        loader = super().get_train_dataloader()  # type: ignore[misc]
        args = self.args  # type: ignore[attr-defined]
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
        """Plan as the host does; with `max_steps` there are as many passes as these need."""
        planned = list(super().set_initial_training_values(args, dataloader))  # type: ignore[misc]
        self.planned_updates = planned[-1]
        if args.max_steps > 0:
            planned[0] = args.max_steps  # no pass has less than one update
        return tuple(planned)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        """Resume at the place in the data: the host would count it in updates of one size."""
        start = super()._init_training_state(  # type: ignore[misc]
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return start  # type: ignore[no-any-return]
        self._control.load(resume_from_checkpoint)
        return self.passes.epoch, 0

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Return the mean loss of a batch after its gradient was added, a microbatch at a time."""
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
            # The host divides by this where the loss is a mean over what it is given.
            self.current_gradient_accumulation_steps = sum(weights) / max(weight, 1)
            with nullcontext() if number == len(parts) else accelerator.no_sync(model):
                losses.append(step(model, part, num_items_in_batch))
        self.last_loss = torch.stack(losses).sum()
        return self.last_loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the host does, with the learning rate that the last update was made with."""
        if "learning_rate" in logs:
            logs = {**logs, "learning_rate": logs["learning_rate"] * self._control.step_factor}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _sums_over(self, model: nn.Module, inputs: Any, num_items: Any) -> bool:
        """Return whether the loss is a sum over the items that the host counts.

        The host takes that for granted where a model takes the number, but BERT and others ignore
        it and return a mean: the host's own accumulation then adds means up. So it is measured.
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
                    f"{name}={value} and the controller both set the batch: leave {name} out;"
                    " per_device_train_batch_size bounds the examples of a forward pass"
                )


class AdaptiveTrainer(AdaptiveBatchMixin, Trainer):  # type: ignore[misc]
    """A `transformers.Trainer` whose batch follows a controller; see :class:`AdaptiveBatchMixin`."""


class DatasetPasses(Passes):
    """Passes that tell their data set and collate function, which the host looks for.

    Attributes:
        dataset: The data set.
        collate_fn: Makes a batch of a list of its items.
    """

    def __init__(self, batches: Any, dataset: Any, collate_fn: Any) -> None:
        super().__init__(batches)
        self.dataset = dataset
        self.collate_fn = collate_fn


def _weight(batch: Mapping[str, Any]) -> int:
    """Return the items over which a mean loss of a batch is taken: labels other than -100."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim < 2 or labels.is_floating_point():
        return num_examples(batch)
    return int(labels.ne(-100).sum())  # read on the host, where the batch may be still
