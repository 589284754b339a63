"""The callbacks of :mod:`hessianflow.integrations.transformers`, which measure and decide."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

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
from hessianflow.interfaces import BatchController, HessianFlowError, LossFn

check_host("transformers", (5, 24), (6,))

from transformers import Trainer, TrainerCallback  # noqa: E402

HOST = "the Trainer of transformers"
STATE_FILE = "hessianflow.pt"
"""Name of the file of this package in a checkpoint of the Trainer."""


class Adaptive(Protocol):
    """The attributes that a callback needs of the Trainer whose batch size it sets.

    Attributes:
        passes: The training data.
        last_loss: Mean loss of the last update.
        planned_updates: Updates that the host planned at the first batch size.
        first_batch_size: The first batch size.
        callback_handler: The host's callbacks.
    """

    passes: Passes
    last_loss: Tensor | None
    planned_updates: int
    first_batch_size: int
    callback_handler: Any


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the loss that a model of transformers computes for a batch with labels."""
    outputs = model(**batch)
    loss: Tensor = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
    return loss


class CurvatureCallback(TrainerCallback):  # type: ignore[misc]
    """Measures the curvature while a Trainer trains, and logs it there.

    A reading is made after every pass over the data, or after every `every` examples, as long as
    the budget allows. The figures are "curvature/eigenvalue", "curvature/edge_share" (the share of
    the stable learning rate in use) and others. The state is kept in the Trainer's checkpoints.

    Args:
        trainer: The Trainer.
        every: Training examples between two readings; None for one pass over the data.
        loss_fn: loss_fn(model, batch), the loss to measure. By default, the model's own loss.
        batch: The probe batch; None for `probe_examples` of the training set.
        probe_examples: Examples of the probe batch, if `batch` is None.
        options: Further options of :class:`hessianflow.curvature.CurvatureProbe`, such as `budget`
            (default: 1 % of the training).

    Raises:
        HessianFlowError: When training begins: an option is out of range, or the data have no items
            by index from which a probe batch could be taken.
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

    def _check_loss(self) -> None:
        """Refuse to measure the model's own loss where the Trainer trains with another."""
        trainer = self._trainer
        others = {
            "compute_loss_func": trainer.compute_loss_func is not None,
            "label_smoothing_factor": trainer.args.label_smoothing_factor > 0,
            "its own compute_loss": type(trainer).compute_loss is not Trainer.compute_loss,
        }
        found = [name for name, is_used in others.items() if is_used]
        if found and self._loss_fn is model_loss:
            raise HessianFlowError(
                f"the Trainer trains with {found[0]}, and the readings would be of the model's own"
                " loss: pass loss_fn=function(model, batch), to AdaptiveTrainer as"
                ' curvature={"loss_fn": function}'
            )

    @property
    def controller(self) -> BatchController | None:
        """Return the controller that sets the batch size; None if this callback only measures."""
        return self.steering.controller

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the probe for the model that is trained."""
        del control
        self._check_loss()
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
            control.should_log = due  # logging clears it, and the host's own figures would be lost

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the learning rates of the optimizer back to the host."""
        del args, state, control, kwargs
        self.steering.finish()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state beside the Trainer's own."""
        del control, kwargs
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and folder.is_dir():
            torch.save(self.state_dict(), folder / STATE_FILE)

    def load(self, folder: str | Path) -> None:
        """Read the state from a checkpoint of the Trainer.

        Raises:
            HessianFlowError: The checkpoint holds no state of this package.
        """
        path = Path(folder, STATE_FILE)
        if not path.is_file():
            raise HessianFlowError(
                f"{folder} holds no {STATE_FILE}, so the batch size and the place in the data are"
                " not known: resume from a checkpoint that this trainer saved"
            )
        self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self._is_loaded = True

    def state_dict(self) -> dict[str, Any]:
        """Return all state that later readings depend on."""
        return {"steering": self.steering.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.steering.load_state_dict(state["steering"])

    def examples(self, args: Any, state: Any) -> int:
        """Return the training examples used so far; all updates of the host have one size."""
        size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return int(state.global_step * size)

    def last_loss(self) -> Tensor | None:
        """Return the mean loss of the last update; None if it is not known."""
        return None

    def _plan(self, args: Any, state: Any, loader: Any) -> Plan:
        total = state.max_steps * args.train_batch_size * args.gradient_accumulation_steps
        total *= args.world_size
        length = getattr(getattr(loader, "dataset", None), "__len__", None)
        examples = total
        if length is not None:
            examples = length()
        return Plan(examples, total, HOST)


class ControlCallback(CurvatureCallback):
    """Lets a controller set the batch size of the :class:`AdaptiveTrainer` that made it."""

    def __init__(self, trainer: Adaptive, controller: BatchController, **options: Any) -> None:
        every = options.pop("every", None)
        super().__init__(trainer, **options)
        self.steering = Steering(controller, every)
        self._adaptive = trainer
        self._scheduled = 0  # steps of the schedule
        self.step_factor = 1.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that nothing else sets the batch size, and make the probe."""
        sets = [
            callback
            for callback in self._trainer.callback_handler.callbacks
            if isinstance(callback, ControlCallback)
        ]
        check_one_controller(sets, "Trainer")
        super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure and decide, and correct the plans that the host made at the first batch size."""
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
        """Return all state that later readings, decisions and batches depend on."""
        passes = self._adaptive.passes.state_dict()
        return {**super().state_dict(), "passes": passes, "scheduled": self._scheduled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, at its place in the data and at its batch size."""
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
        planned: int = round(args.num_train_epochs * self._adaptive.passes.num_examples)
        return planned

    def _advance(self, scheduler: Any, done: float) -> None:
        """Let the schedule follow the examples, beyond the step that the host makes per update.

        Args:
            scheduler: The host's schedule, which ends after the updates planned at the first batch
                size.
            done: Share of the run's examples that were used.
        """
        if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
            return
        while self._scheduled < int(done * self._planned_updates + 1e-9):
            scheduler.step()
            self._scheduled += 1

    def _updates_left(self, args: Any) -> int:
        """Return the number of updates until the planned examples are used, at this batch size."""
        passes = self._adaptive.passes
        left = self._planned(args) - passes.examples
        in_pass = min(left, -passes.examples % passes.num_examples)
        whole, part = divmod(left - in_pass, passes.num_examples)
        updates = -(-in_pass // passes.batch_size) + -(-part // passes.batch_size)
        return updates + whole * -(-passes.num_examples // passes.batch_size)
