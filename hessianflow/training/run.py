"""The operations on a run that a trainer has built: begin, resume, stop, save, restore."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hessianflow.checks import in_home
from hessianflow.interfaces import (
    Adversary,
    AgreedError,
    Decision,
    HessianFlowError,
    Progress,
    ResizableBatches,
    World,
)
from hessianflow.measuring import unwrap
from hessianflow.runs.folder import history_length
from hessianflow.runs.history import History
from hessianflow.runs.rows import Record
from hessianflow.runs.sinks import LOGGER
from hessianflow.runs.summary import summary_of
from hessianflow.training.checkpoint import differences, split_of
from hessianflow.training.checks import join_parts, must_pair
from hessianflow.training.divergence import largest
from hessianflow.training.extent import known
from hessianflow.training.loop import TrainingLoop
from hessianflow.training.optimizers import set_mode
from hessianflow.training.state import separate_generators
from hessianflow.training.world import on_first_rank


class Run:
    """The operations on a trainer that a subclass has built.

    Args:
        loop: the parts of the run.
        config: settings to write to config.json besides the trainer's own.
        notices: messages for the user as the run begins; empty ones are left out.

    Attributes:
        controller: decides the batch size; None: the batch size stays as it is.
        reference_batch_size: the batch size at which the learning rate is stated.
    """

    def __init__(
        self, loop: TrainingLoop, config: Mapping[str, Any], notices: Sequence[str]
    ) -> None:
        self._loop = loop
        self._config = dict(config)
        self._notices = [text for text in notices if text]
        self.controller = loop.steering.methods.controller
        self.reference_batch_size = loop.rate.reference_batch_size
        self.world.attach(self.model, loop.step.trained.current)
        self.rejoin()

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self._loop.model

    @property
    def train_data(self) -> ResizableBatches:
        """The data that the model is trained on."""
        return self._loop.steering.train_data

    @property
    def adversary(self) -> Adversary | None:
        """The adversary that attacks the batches; None: there is none."""
        return self._loop.steering.methods.adversary

    @property
    def epochs(self) -> int | None:
        """Passes over the training data; None if the run ends after updates or examples."""
        return self._loop.course.extent.passes

    @property
    def counts_passes(self) -> bool:
        """Whether the run and its epochs are counted only in passes over the training data."""
        return self._loop.course.extent.counts_passes

    @property
    def world(self) -> World:
        """The ranks that train together."""
        return self._loop.world

    def fit(self) -> History:
        """Train to the end of the run and return the records.

        Training begins with the first example of the data's current epoch, even if batches of it
        were read before, or another run stopped within it. After an interruption in the same
        process (Ctrl-C, an error in the data), a second call continues with the batch that was not
        trained. A run with a run directory is continued by :meth:`resume` instead.

        Raises:
            HessianFlowError: the run is over already; the run directory is in use or cannot be
                written; the loss stopped being finite.
        """
        loop = self._loop
        record = loop.keeper.record
        if not loop.course.is_unfinished:
            counters = loop.course.counters
            raise AgreedError(
                f"this run is over, after {counters.epoch} epochs and {counters.updates} updates:"
                " train on with a new trainer, for the same model, optimizer and data, or resume a"
                " run directory with more epochs"
            )
        if loop.guard.divergence.mode == "rollback" and loop.keeper.run_dir is None:
            raise AgreedError('Divergence("rollback") goes back to checkpoints: it needs a run_dir')
        self.world.meet(self.settings())
        options = {"options": loop.keeper.state.settings}
        config = {**self._config, "trainer": {**self.settings(), **options}}
        on_first_rank(self.world, lambda: record.start(config))
        self._tell()
        if loop.course.counters.updates == 0:
            separate_generators(self.world.rank)
            try:
                self.begin()
                loop.keeper.save()
            except HessianFlowError:
                record.close()
                raise
        return self._run()

    def begin(self) -> None:
        """Put the controller's first setting in force, before any training with :meth:`run_until`.

        Raises:
            HessianFlowError: the model's weights are not finite.
        """
        self._loop.ahead.begin()
        set_mode(self._loop.step.optimizer, training=True)
        self._loop.steering.apply(self._loop.steering.decision)
        if not math.isfinite(largest(self._loop.step.trained.current)):
            raise AgreedError("the model's weights are not finite before the first step")

    def resume(self, run_dir: str | Path) -> History:
        """Continue an interrupted run from its newest checkpoint to the end, at any world size.

        On a CPU, with as many ranks as before, the weights end bit for bit as if the run had never
        been interrupted. Where settings differ, an event says which are in force: those of this
        trainer, except for the options of optimizer and scheduler, which the checkpoint holds.

        Raises:
            HessianFlowError: no usable checkpoint there, or one of another model or data set.
        """
        self.world.meet(self.settings())
        keeper = self._loop.keeper
        record = keeper.record
        folder = in_home(run_dir)
        keeper.run_dir = folder
        try:
            on_first_rank(self.world, lambda: record.hold(folder))
            state, warning = keeper.restore_newest(lambda: history_length(folder))
            on_first_rank(self.world, lambda: record.reopen(folder, state["history_bytes"]))
        except HessianFlowError:
            record.close()
            raise
        if warning is not None:
            self._loop.reporter.event("fallback", warning)
        self._tell(differences(state["settings"], keeper.state.settings))
        return self._run()

    def _tell(self, changed: str = "") -> None:
        """Record and log, once a run, the notices and the settings `changed` by a resume."""
        reporter = self._loop.reporter
        messages = [("notice", text) for text in self._notices]
        for event, message in [*messages, ("settings", changed)]:
            if message and not reporter.record.has_event(event, message):
                reporter.event(event, message)
                if self.world.rank == 0:
                    LOGGER.warning(message)

    def request_stop(self) -> None:
        """Ask the loop to save a checkpoint and return after the present step, or the one after it.

        A request made while the end of an epoch is recorded (by a sink or a measurement) takes
        effect there. The call is safe in a signal handler, and one call on any rank is enough.
        """
        self._loop.stop_requested = True

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        return self._loop.course.progress

    @property
    def decision(self) -> Decision:
        """The setting in force."""
        return self._loop.steering.decision

    @property
    def is_settled(self) -> bool:
        """Whether all that follows the last update was done; a rank may have failed before."""
        return self._loop.course.is_settled

    @property
    def microbatch_size(self) -> int:
        """Examples per forward pass in the next step; a search may change it."""
        return self._loop.step.microbatch.size

    @property
    def records(self) -> list[Record]:
        """All rows made so far, the same on every rank."""
        return self._loop.keeper.record.records

    def rejoin(self) -> None:
        """Take this rank's place in the world, which may have changed since the last update."""
        if must_pair(self.model, self.world, None) and not self._loop.step.accumulate.paired:
            raise HessianFlowError(
                "SyncBatchNorm needs all ranks from the start: use norm_batch_size where ranks come"
            )
        self.world.shard(self.train_data)
        self._loop.keeper.forget_plans()
        methods = self._loop.steering.methods
        join_parts(self.world, methods.observers, methods.adversary)

    def run_until(self, updates: int | None = None) -> None:
        """Train until `updates` updates have been made, or to the end; the records stay open.

        Raises:
            DivergenceError: the loss stopped being finite.
        """
        self._loop.run_until(updates)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run as tensors and plain values, complete for a restart."""
        return self._loop.keeper.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], source: str = "the checkpoint") -> None:
        """Continue from a :meth:`state_dict` of the same settings; errors call it `source`."""
        self._loop.keeper.load_state_dict(state, source)

    def _run(self) -> History:
        record = self._loop.keeper.record
        try:
            self._loop.run_until()
            summary = self.summary()
            on_first_rank(self.world, lambda: record.finish(summary))
        finally:
            record.close()
        return on_first_rank(self.world, record.history)

    def summary(self) -> dict[str, Any]:
        """Return what summary.json would hold if the run ended now."""
        keeper = self._loop.keeper
        return summary_of(
            keeper.record.history(),
            self.progress,
            self.decision,
            keeper.state.stopwatch.totals(),
            self._loop.step.device,
            self.world.world_size,
        )

    def settings(self) -> dict[str, Any]:
        """Return what config.json holds about the trainer itself."""
        step = self._loop.step
        extent = self._loop.course.extent
        device = str(step.device)
        if self.world.world_size > 1:
            device = step.device.type  # The index differs between ranks, the settings must not.
        return {
            "model": type(unwrap(self.model)).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "optimizer": type(step.optimizer).__name__,
            **split_of(self.model, step.optimizer),
            "controller": _class_of(self.controller),
            "adversary": _class_of(self.adversary),
            **extent.settings,
            "examples_per_epoch": known(extent.examples_per_epoch),
            "reference_batch_size": self.reference_batch_size,
            "microbatch_size": step.microbatch.size,
            "norm_batch_size": self._loop.norm_batch_size,
            "precision": step.accumulate.precision,
            "device": device,
        }


def _class_of(part: object) -> str | None:
    """Return the name of the class of a part; None where there is no part."""
    if part is None:
        return None
    return type(part).__name__
