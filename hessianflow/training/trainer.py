"""The training loop: batches whose size a controller sets, an adversary, and curvature, around any optimizer.

The trainer knows protocols only (:mod:`hessianflow.interfaces`). One step: next batch at the current size -> batch
transform -> adversary -> gradient in microbatches, each weighted by its examples -> optimizer step ->
`adversary.after_step` -> progress counted in examples -> if the controller is due: probe -> reading ->
`controller.update` -> decision applied and recorded.

On several ranks every rank runs this loop on its part of every batch. What depends on a clock, a signal or one rank's
numbers is agreed on through the world before anybody acts on it; rank 0 alone keeps the records.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hessianflow.interfaces import (
    Adversary,
    AgreedError,
    Batch,
    BatchController,
    BatchTransform,
    CurvatureProbe,
    Decision,
    EpochMeasurement,
    GradientObserver,
    HessianFlowError,
    LossFn,
    Progress,
    RecordSink,
    ResizableBatches,
    World,
)
from hessianflow.measuring import unwrap
from hessianflow.runs import History, Recorder
from hessianflow.runs.folder import history_length
from hessianflow.runs.rows import Record
from hessianflow.runs.summary import summary_of
from hessianflow.training import checkpoint
from hessianflow.training.accumulate import GradientAccumulator, Precision
from hessianflow.training.checks import check_data, check_run, check_signals, join_parts, must_pair, trained_parameters
from hessianflow.training.control_point import ControlPoint, CurvatureSchedule
from hessianflow.training.divergence import DivergencePolicy, OnDivergence
from hessianflow.training.learning_rate import LearningRate, ScheduleUnit
from hessianflow.training.lookahead import Lookahead, check_staleness
from hessianflow.training.loop import TrainingLoop
from hessianflow.training.microbatch import MicrobatchSize
from hessianflow.training.saving import Saver
from hessianflow.training.state import RunState, separate_generators
from hessianflow.training.step import TrainingStep
from hessianflow.training.timing import Stopwatch
from hessianflow.training.totals import RunningTotals
from hessianflow.training.world import LocalWorld, on_first_rank

AUTO_START = 128
"""Where the search for a microbatch size begins. Ours."""


class AdaptiveBatchTrainer:
    """Trains a model while a controller sets batch size, learning-rate factor and adversarial share.

    Args:
        model: any module; trained in place, on the device its parameters are on.
        train_data: a :class:`~hessianflow.interfaces.ResizableBatches`, such as `hf.data.DeviceBatches` (tensors) or
            `hf.data.AdaptiveBatches` (any map-style Dataset).
        eval_data: one (inputs, targets) pair or a re-iterable of pairs, evaluated after every epoch.
        optimizer: any torch optimizer; stepped by its own `step()`, with a closure where that requires one (SAM,
            LBFGS).
        loss_fn: loss_fn(outputs, targets), a mean over examples (or a sum or a vector: see `LossFn`).
        controller: decides the batch size; None keeps that of `train_data`.
        adversary: perturbs the share of each batch that the controller asks for, or trains on adversarial twins of it
            (:class:`~hessianflow.adversarial.ConcurrentAdversary`); progress counts the examples drawn from the data.
        epochs: passes over the training data.
        scheduler: any torch scheduler; the controller's factor multiplies the rate it sets.
        schedule_unit: "epoch": the scheduler steps once an epoch. "reference_batch": once per reference batch of
            examples, so that a schedule counted in steps keeps its meaning when
            the batch grows.
        probe: measures curvature, when the controller needs it and, with `curvature="epoch"`, after every epoch.
        reference_batch_size: batch size that the learning rate is stated at; None: the one the run starts with.
        microbatch_size: examples per forward pass on the device; halved for good when memory runs out. "auto" looks for
            the fastest that fits. None: "auto" on a GPU, elsewhere the reference batch size.
        norm_batch_size: examples that batch normalisation sees at once in training ("ghost" batch normalisation). None:
            the reference batch size, as the published runs had in effect. 0: the whole microbatch.
        transform: applied to each whole batch before the adversary.
        before_evaluation: called after every epoch, before the model is evaluated and saved: may set its buffers.
        measurements: made and recorded after every epoch, such as :class:`~hessianflow.adversarial.RobustnessWatch`.
        observers: shown the gradient of every microbatch; their signals go to the controller.
        max_grad_norm: clip the gradient of each step to this norm.
        precision: "float32", or autocast in "bf16" or "fp16" (the latter with loss scaling).
        run_dir: where config, history, checkpoints and summary go; None keeps records in memory.
        config: settings to write to config.json beside the trainer's own.
        sinks: further receivers of every record.
        checkpoint_examples: also save a checkpoint every so many examples within an epoch.
        checkpoint_minutes: also save one every so many minutes.
        keep_checkpoints: how many of the newest are kept (the best one is kept besides).
        on_divergence: when the loss is no longer finite, or explodes: "stop", or "rollback": go back to the last
            checkpoint, undo the last growth and keep the batch below it from then on.
        max_rollbacks: how often, before stopping all the same.
        show_progress: True, False, or None: only on a terminal.
        world: the ranks to train with, such as `hf.distributed.GroupWorld(reducer)`; every rank makes a trainer of the
            same settings and calls the same methods. None: this process alone.

    Raises:
        HessianFlowError: no trainable parameter; a batch larger than the data; no epochs; an adversary that is staler
            than the run is long.
    """

    def __init__(
        self,
        model: nn.Module,
        train_data: ResizableBatches,
        eval_data: Batch | Iterable[Batch] | None = None,
        *,
        optimizer: Optimizer,
        loss_fn: LossFn,
        controller: BatchController | None = None,
        adversary: Adversary | None = None,
        epochs: int,
        scheduler: LRScheduler | None = None,
        schedule_unit: ScheduleUnit = "epoch",
        probe: CurvatureProbe | None = None,
        curvature: CurvatureSchedule = "epoch",
        reference_batch_size: int | None = None,
        microbatch_size: int | Literal["auto"] | None = None,
        norm_batch_size: int | None = None,
        transform: BatchTransform | None = None,
        before_evaluation: Callable[[], None] | None = None,
        measurements: Sequence[EpochMeasurement] = (),
        observers: Sequence[GradientObserver] = (),
        max_grad_norm: float | None = None,
        precision: Precision = "float32",
        run_dir: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
        sinks: Iterable[RecordSink] = (),
        checkpoint_examples: int | None = None,
        checkpoint_minutes: float | None = None,
        keep_checkpoints: int = 2,
        on_divergence: OnDivergence = "stop",
        max_rollbacks: int = 3,
        show_progress: bool | None = None,
        world: World | None = None,
    ) -> None:
        check_data(train_data)
        decision = Decision(train_data.batch_size) if controller is None else controller.decision
        check_signals(controller, probe is not None, bool(observers), train_data.num_examples)
        check_run(model, optimizer, decision.batch_size, train_data.num_examples, epochs)
        self.model, self.train_data, self.eval_data, self.loss_fn = model, train_data, eval_data, loss_fn
        self.controller, self.adversary, self.epochs = controller, adversary, epochs
        self.world: World = LocalWorld() if world is None else world
        self.reference_batch_size = reference_batch_size or decision.batch_size
        self.norm_batch_size = self.reference_batch_size if norm_batch_size is None else norm_batch_size or None
        device = next(model.parameters()).device
        watch = Stopwatch(device)
        paired = must_pair(model, self.world, microbatch_size)
        if paired:
            microbatch_size = train_data.num_examples
        if microbatch_size is None:
            microbatch_size = "auto" if device.type == "cuda" else self.reference_batch_size
        microbatch = MicrobatchSize(microbatch_size, min(AUTO_START, self.reference_batch_size), device)
        trained = trained_parameters(model, optimizer)
        accumulate = GradientAccumulator(
            model, loss_fn, trained, observers, precision, self.norm_batch_size, self.world, paired
        )
        step = TrainingStep(
            model, optimizer, accumulate, microbatch, adversary, transform, watch, device, self.world, max_grad_norm
        )
        depth = 0 if adversary is None else adversary.staleness
        check_staleness(depth, decision.batch_size, train_data.num_examples, epochs)
        ahead = Lookahead(train_data, depth, step.load, device, watch)
        totals, rate = RunningTotals(device, watch.totals()), LearningRate(optimizer, scheduler, schedule_unit)
        parts: dict[str, Any] = {
            "train_data": train_data,
            # Before the adversary: its attacks under way end first, when states are taken as when they are put back.
            "look-ahead": ahead if depth else None,
            "controller": controller,
            "adversary": adversary,
            "probe": probe,
            "learning rate": rate,
            "loss scale": accumulate.scaler,
            "totals": totals,
            "microbatch": microbatch,
            "loss": loss_fn if isinstance(loss_fn, nn.Module) else None,
        }
        parts |= {f"observer {number}": observer for number, observer in enumerate(observers)}
        parts |= {f"measurement {number}": measurement for number, measurement in enumerate(measurements)}
        first, folder = self.world.rank == 0, None if run_dir is None else Path(run_dir)
        self._loop = TrainingLoop(
            model=model,
            train_data=train_data,
            ahead=ahead,
            eval_data=eval_data,
            before_evaluation=before_evaluation,
            measurements=measurements,
            loss_fn=loss_fn,
            epochs=epochs,
            schedule_unit=schedule_unit,
            reference_batch_size=self.reference_batch_size,
            norm_batch_size=self.norm_batch_size,
            step=step,
            control=ControlPoint(controller, probe, tuple(observers), curvature, watch, self.world),
            totals=totals,
            rate=rate,
            state=RunState(model, optimizer, parts, watch),
            record=Recorder(folder if first else None, sinks if first else ()),
            saver=Saver(checkpoint_examples, checkpoint_minutes, keep_checkpoints),
            policy=DivergencePolicy(on_divergence, max_rollbacks),
            watch=watch,
            world=self.world,
            decision=decision,
            run_dir=folder,
            show_progress=show_progress if first else False,
        )
        self._config = dict(config or {})
        self.world.attach(model, trained)
        self.rejoin()

    def fit(self) -> History:
        """Train for `epochs` epochs and return the records.

        Raises:
            HessianFlowError: the run directory is in use or cannot be written; the loss stopped being finite.
        """
        loop = self._loop
        if loop.policy.mode == "rollback" and loop.run_dir is None:
            raise AgreedError('on_divergence="rollback" goes back to checkpoints: it needs a run_dir')
        self.world.meet(self.settings())
        on_first_rank(self.world, lambda: loop.record.start({**self._config, "trainer": self.settings()}))
        separate_generators(self.world.rank)
        try:
            self.begin()
            loop.save()
        except HessianFlowError:
            loop.record.close()
            raise
        return self._run()

    def begin(self) -> None:
        """Put the controller's first setting in force, before any training with :meth:`run_until`.

        Raises:
            HessianFlowError: weights that are not finite.
        """
        self._loop.apply(self._loop.decision)
        if not checkpoint.all_finite(self._loop.step.accumulate.parameters):
            raise AgreedError("the model's weights are not finite before the first step")

    def resume(self, run_dir: str | Path) -> History:
        """Continue an interrupted run of the same settings from its newest checkpoint to the end, at any world size.

        On a CPU, with as many ranks as before, the weights end bit for bit as if the run had never been interrupted.

        Raises:
            HessianFlowError: no usable checkpoint there, or one of another model or data set.
        """
        self.world.meet(self.settings())
        loop, folder = self._loop, Path(run_dir)
        loop.run_dir = folder
        try:
            on_first_rank(self.world, lambda: loop.record.hold(folder))
            state, warning = loop.restore_newest(lambda: history_length(folder))
            on_first_rank(self.world, lambda: loop.record.reopen(folder, state["history_bytes"]))
        except HessianFlowError:
            loop.record.close()
            raise
        if warning is not None:
            loop.event("fallback", warning)
        return self._run()

    def request_stop(self) -> None:
        """Ask the loop to save a checkpoint and return after the step it is in, or at the latest the one after it.

        Safe in a signal handler. On several ranks it is enough to ask on one.
        """
        self._loop.stop_requested = True

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        return self._loop.progress

    @property
    def decision(self) -> Decision:
        """The setting in force."""
        return self._loop.decision

    @property
    def is_settled(self) -> bool:
        """Whether all that follows the last update (decision, evaluation) was done; not so when a rank failed there."""
        counters = self._loop.state.counters
        return counters.settled == counters.updates

    @property
    def microbatch_size(self) -> int:
        """Examples a forward pass, as far as is known by now."""
        return self._loop.step.microbatch.size

    @property
    def records(self) -> list[Record]:
        """All rows made so far: those of every rank on rank 0, and the same ones on the others."""
        return self._loop.record.records

    def rejoin(self) -> None:
        """Take this rank's place in the world, which may have changed since the last update."""
        if must_pair(self.model, self.world, None) and not self._loop.step.accumulate.paired:
            raise HessianFlowError("SyncBatchNorm needs all ranks from the start: use norm_batch_size where ranks come")
        self.world.shard(self.train_data)
        join_parts(self.world, self._loop.control.observers, self._loop.step.adversary)

    def run_until(self, updates: int | None = None) -> None:
        """Train until so many updates have been made in all, or to the end; the records stay open for more.

        Raises:
            DivergenceError: the loss stopped being finite.
        """
        self._loop.run_until(updates)

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to continue as if it had never stopped: tensors and plain values."""
        return self._loop.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], source: str = "the checkpoint") -> None:
        """Continue from :meth:`state_dict` of a trainer of the same settings; `source` names it in errors."""
        self._loop.load_state_dict(state, source)

    def _run(self) -> History:
        loop = self._loop
        try:
            loop.run_until()
            found = self.summary()
            on_first_rank(self.world, lambda: loop.record.finish(found))
        finally:
            loop.record.close()
        return on_first_rank(self.world, loop.record.history)

    def summary(self) -> dict[str, Any]:
        """What summary.json would hold if the run ended now."""
        loop = self._loop
        seconds, size = loop.watch.totals(), self.world.world_size
        return summary_of(loop.record.history(), self.progress, loop.decision, seconds, loop.step.device, size)

    def settings(self) -> dict[str, Any]:
        """What config.json holds of the trainer itself."""
        step = self._loop.step
        return {
            "model": type(unwrap(self.model)).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "optimizer": type(step.optimizer).__name__,
            "controller": None if self.controller is None else type(self.controller).__name__,
            "adversary": None if step.adversary is None else type(step.adversary).__name__,
            "epochs": self.epochs,
            "examples_per_epoch": self.train_data.num_examples,
            "reference_batch_size": self.reference_batch_size,
            "microbatch_size": step.microbatch.size,
            "norm_batch_size": self.norm_batch_size,
            "precision": step.accumulate.precision,
            "device": step.device.type if self.world.world_size > 1 else str(step.device),
        }
