"""Curvature and growing batches in Lightning.

    from hessianflow.integrations.lightning import AdaptiveBatch, batches
    trainer = Trainer(callbacks=[AdaptiveBatch(loss_fn, controller=...)])
    trainer.fit(module, batches(train_set, 32))

With `batches` (or `Passes(hf.data.AdaptiveBatches(...))`) as training data, alone or from a
datamodule, a new batch size takes effect with the very next batch, even in the middle of a pass,
without restarting workers. With a DataLoader of any kind, the batch grows by accumulation, in
multiples of the loader's batch size. Lightning counts the batches to accumulate from the start of a
pass, so a new number waits until that count is a multiple of it, or until the next pass.

Two things are left to the host: its progress bar shows the length that a pass had at its start, and
schedules with the interval "step" count updates.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hessianflow.batches import num_examples, to_device
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
from hessianflow.interfaces import BatchController, HessianFlowError, LossFn, Shardable

check_host("lightning", (2, 5), (3,))

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import GradientAccumulationScheduler  # noqa: E402

HOST = "Lightning"


def batches(dataset: Dataset[Any], batch_size: int, **options: Any) -> Passes:
    """Return training data for Lightning whose batch size can change at any time.

    Args:
        dataset: Map-style data set.
        batch_size: Examples per batch, over all ranks, until a controller decides.
        options: Further options of :class:`hessianflow.data.AdaptiveBatches`.
    """
    return Passes(AdaptiveBatches(dataset, batch_size, **options))


class AdaptiveBatch(Callback):  # type: ignore[misc]
    """Measures the curvature, and lets a controller set batch size and learning rate, in Lightning.

    Readings are made after every pass over the data, or after every `every` examples, as long as
    the budget allows. The module's logger logs them as "curvature/eigenvalue",
    "curvature/edge_share" (the share of the stable learning rate in use), "batch/size" and others.
    The state is part of Lightning's checkpoints. It includes the state of torch's random
    generators, which Lightning does not save.

    Args:
        loss_fn: loss_fn(outputs, targets) of the module's `forward`, or loss_fn(module, batch) for
            a batch that is a dict.
        controller: Any controller of `hf.control` that needs only curvature, loss or learning rate.
            Its decision sets the first batch size. None only measures.
        every: Examples between two readings, which the controller counts as an epoch; None for one
            pass over the data.
        batch: The probe batch, the same on all ranks; None for `probe_examples` of the training
            data.
        probe_examples: Examples of the probe batch, if `batch` is None.
        options: Further options of :class:`hessianflow.curvature.CurvatureProbe`, such as `budget`
            (default: 1 % of the training).

    Raises:
        HessianFlowError: When training begins: there are several optimizers, something else sets
            the batch size as well, or the controller needs a signal that Lightning does not give.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        *,
        controller: BatchController | None = None,
        every: int | None = None,
        batch: Any = None,
        probe_examples: int = PROBE_EXAMPLES,
        **options: Any,
    ) -> None:
        self._loss_fn = loss_fn
        self._batch = batch
        self._probe_examples = probe_examples
        self._options = options
        self._steering = Steering(controller, every)
        self._passes: Passes | None = None
        self._examples = 0  # counted only if a DataLoader makes the batches
        self._loader_batch = 0
        self._generators: Mapping[str, Any] | None = None  # until training begins
        self._place: Mapping[str, Any] | None = None

    @property
    def controller(self) -> BatchController | None:
        """Return the controller that sets the batch size; None if this callback only measures."""
        return self._steering.controller

    @property
    def state_key(self) -> str:
        """Return the name of the state in checkpoints, which must differ between callbacks."""
        controller = type(self.controller).__name__
        key: str = self._generate_state_key(controller=controller, every=self._steering.every)
        return key

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run that cannot be steered, before anything is trained."""
        del pl_module
        if len(trainer.optimizers) != 1:
            raise HessianFlowError(
                f"AdaptiveBatch steers one optimizer, got {len(trainer.optimizers)}: use one, or"
                " measure in the module itself with hf.curvature.CurvatureProbe"
            )
        if self.controller is None:
            return
        sets = [
            callback
            for callback in trainer.callbacks
            if isinstance(callback, GradientAccumulationScheduler)
            or (isinstance(callback, AdaptiveBatch) and callback.controller is not None)
        ]
        check_one_controller(sets, "Trainer")
        if trainer.accumulate_grad_batches != 1:
            raise HessianFlowError(
                f"accumulate_grad_batches={trainer.accumulate_grad_batches} and the controller both"
                " set the batch size: leave it out, since the controller accumulates where it must"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the probe of the module and its data."""
        data = trainer.train_dataloader
        world = current_world(pl_module.device)
        self._passes = None
        if isinstance(data, Passes):
            self._passes = data
            self._share_out(self._passes, trainer)
            if self._place is not None:  # Lightning itself loses the place at the end of a pass
                self._passes.load_state_dict(self._place)
                self._place = None
            examples = self._passes.num_examples
        else:
            self._loader_batch = _size_of(data) * trainer.world_size
            self._check_multiple()
            examples = len(data) * self._loader_batch
            if hasattr(data.dataset, "__len__"):
                examples = len(data.dataset)
        batch = self._batch
        if batch is None:
            batch = probe_batch(data, self._probe_examples)
        optimizer = trainer.optimizers[0]
        probe = make_probe(
            pl_module,
            self._loss_fn,
            to_device(batch, pl_module.device),
            optimizer,
            world,
            self.controller,
            self._options,
        )
        total = sys.maxsize
        if trainer.max_epochs not in (None, -1):
            total = trainer.max_epochs * examples
        self._steering.start(Plan(examples, total, HOST), optimizer, probe, world)
        self._put_in_force(trainer, at_start=True)
        if self._generators is not None:
            _restore(self._generators)
            self._generators = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Accumulate as decided, now that the host's count starts at 0."""
        del pl_module
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0 or self._passes is None:
            self._put_in_force(trainer, at_start=True)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tell the host how many batches the pass has, now that its size may have changed."""
        del pl_module, batch, batch_idx
        if self._passes is not None:
            _set_length(trainer, self._passes)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure, decide and log after an update."""
        del batch_idx
        if self._passes is None:
            self._examples += num_examples(batch) * trainer.world_size
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        examples = self._examples
        if self._passes is not None:
            examples = self._passes.examples
        figures = self._steering.after_update(examples, _loss_of(outputs))
        self._put_in_force(trainer, at_start=False)
        if figures and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)
        del pl_module

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the learning rates of the optimizer back to the host."""
        del trainer, pl_module
        self._steering.finish()

    def state_dict(self) -> dict[str, Any]:
        """Return all state that later readings and decisions depend on, and the random states."""
        passes = None
        if self._passes is not None:
            passes = self._passes.state_dict()
        return {
            "steering": self._steering.state_dict(),
            "passes": passes,
            "examples": self._examples,
            "generators": _generators(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state once training begins."""
        self._steering.load_state_dict(state_dict["steering"])
        self._examples = state_dict["examples"]
        self._generators = state_dict["generators"]
        self._place = state_dict["passes"]

    def _check_multiple(self) -> None:
        """Refuse a first batch that cannot be accumulated from the batches of a DataLoader."""
        decision = self._steering.decision
        if decision is not None and decision.batch_size % self._loader_batch != 0:
            raise HessianFlowError(
                f"the controller's first batch size {decision.batch_size} is no multiple of the"
                f" {self._loader_batch} examples that the DataLoader gives on all ranks: start the"
                " controller at a multiple, or train on"
                " hessianflow.integrations.lightning.batches(train_set, batch_size)"
            )

    def _share_out(self, passes: Passes, trainer: Trainer) -> None:
        """Give each rank its part of every batch; Lightning does so only for DataLoaders."""
        if isinstance(passes.batches, Shardable):
            passes.batches.set_shard(trainer.global_rank, trainer.world_size)

    def _put_in_force(self, trainer: Trainer, *, at_start: bool) -> None:
        """Set the batch size, or the number of accumulated batches once the host's count fits."""
        decision = self._steering.decision
        if decision is None:
            return
        if self._passes is not None:
            self._passes.set_batch_size(decision.batch_size)
            return
        number = max(1, round(decision.batch_size / self._loader_batch))
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if at_start or ready % number == 0:
            trainer.accumulate_grad_batches = number


def _set_length(trainer: Trainer, passes: Passes) -> None:
    """Set the number of batches at which the host sees the end of a pass."""
    loop = trainer.fit_loop
    length = loop.epoch_loop.batch_progress.current.ready + passes.left
    share = trainer.val_check_interval
    if length != loop.max_batches and isinstance(share, float) and trainer.val_check_batch:
        trainer.val_check_batch = max(1, int(length * share))
    loop.max_batches = length
    loop.epoch_loop.batch_progress.is_last_batch = passes.left == 0


def _size_of(loader: Any) -> int:
    """Return the number of examples in a batch of a DataLoader."""
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if size is None:
        raise HessianFlowError(
            f"the batch size of a {type(loader).__name__} is not known: train on"
            " hessianflow.integrations.lightning.batches(train_set, batch_size)"
        )
    return int(size)


def _loss_of(outputs: Any) -> Tensor | None:
    if isinstance(outputs, Mapping):
        outputs = outputs.get("loss")
    if isinstance(outputs, Tensor):
        return outputs
    return None


def _generators() -> dict[str, Any]:
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
