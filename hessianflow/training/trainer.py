"""The training loop: batches whose size a controller sets, an adversary, and curvature, around any optimizer.

The trainer knows protocols only (:mod:`hessianflow.interfaces`). One step: next batch at the current size -> batch
transform -> adversary -> gradient in microbatches, each weighted by its examples -> optimizer step ->
`adversary.after_step` -> progress counted in examples -> if the controller is due: probe -> reading ->
`controller.update` -> decision applied and recorded.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hessianflow.batches import move
from hessianflow.interfaces import (
    Adversary,
    Batch,
    BatchController,
    BatchTransform,
    CurvatureProbe,
    CurvatureReading,
    Decision,
    GradientObserver,
    HessianFlowError,
    LossFn,
    Progress,
    RecordSink,
    ResizableBatches,
)
from hessianflow.training import checkpoint, rows
from hessianflow.training.accumulate import BatchResult, GradientAccumulator, Precision
from hessianflow.training.evaluate import evaluate
from hessianflow.training.learning_rate import LearningRate, ScheduleUnit
from hessianflow.training.progress import ProgressBar
from hessianflow.training.record import History, RunRecord
from hessianflow.training.timing import Stopwatch
from hessianflow.training.totals import RunningTotals

CurvatureSchedule = Literal["epoch", "needed"]


class AdaptiveBatchTrainer:
    """Trains a model while a controller sets batch size, learning-rate factor and adversarial share.

    Args:
        model: any module; trained in place, on the device its parameters are on.
        train_data: a :class:`~hessianflow.interfaces.ResizableBatches`, such as `hf.data.DeviceBatches` (tensors) or
            `hf.data.AdaptiveBatches` (any map-style Dataset).
        eval_data: one (inputs, targets) pair or a re-iterable of pairs, evaluated after every epoch.
        optimizer: any torch optimizer; stepped by its own `step()`.
        loss_fn: loss_fn(outputs, targets), a mean over examples (or a sum or a vector: see `LossFn`).
        controller: decides the batch size; None keeps that of `train_data`.
        adversary: perturbs the share of each batch that the controller asks for.
        epochs: passes over the training data.
        scheduler: any torch scheduler; the controller's factor multiplies the rate it sets.
        schedule_unit: "epoch": the scheduler steps once an epoch. "reference_batch": once per reference batch of
            examples (the batch size the run starts with), so that a schedule counted in steps keeps its meaning when
            the batch grows.
        probe: measures curvature, when the controller needs it and, with `curvature="epoch"`, after every epoch.
        microbatch_size: examples per forward pass on the device. Default (ours): the batch size the run starts with, so
            that batch normalisation sees the same number of examples all along, as in the published runs.
        transform: applied to each whole batch before the adversary.
        observers: shown the gradient of every microbatch; their signals go to the controller.
        precision: "float32", or autocast in "bf16" or "fp16" (the latter with loss scaling).
        run_dir: where config, history, checkpoints and summary go; None keeps records in memory.
        config: settings to write to config.json beside the trainer's own.
        sinks: further receivers of every record.
        checkpoint_examples: also save a checkpoint every so many examples within an epoch.
        show_progress: True, False, or None: only on a terminal.

    Raises:
        HessianFlowError: no trainable parameter; a batch larger than the data; no epochs.
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
        microbatch_size: int | None = None,
        transform: BatchTransform | None = None,
        observers: Sequence[GradientObserver] = (),
        precision: Precision = "float32",
        run_dir: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
        sinks: Iterable[RecordSink] = (),
        checkpoint_examples: int | None = None,
        show_progress: bool | None = None,
    ) -> None:
        decision = Decision(train_data.batch_size) if controller is None else controller.decision
        _check(model, optimizer, decision.batch_size, train_data.num_examples, epochs)
        self.model, self.train_data, self.eval_data = model, train_data, eval_data
        self.optimizer, self.loss_fn, self.controller, self.adversary = optimizer, loss_fn, controller, adversary
        self.epochs, self.schedule_unit, self.probe, self.curvature = epochs, schedule_unit, probe, curvature
        self.transform, self.observers, self.checkpoint_examples = transform, tuple(observers), checkpoint_examples
        self.show_progress = show_progress
        self.reference_batch_size = decision.batch_size
        size = decision.batch_size if microbatch_size is None else microbatch_size
        self._accumulate = GradientAccumulator(model, loss_fn, size, self.observers, precision)
        self._rate = LearningRate(optimizer, scheduler)
        self._device = next(model.parameters()).device
        self._watch = Stopwatch(self._device)
        self._totals = RunningTotals(self._device, self._watch.totals())
        self._record = RunRecord(run_dir, sinks)
        self._config = dict(config or {})
        self._decision = decision
        self._reading: CurvatureReading | None = None
        self._examples = self._updates = self._saved_at = 0
        self._best: float | None = None
        self._stop_requested = False

    def fit(self) -> History:
        """Train for `epochs` epochs and return the records.

        Raises:
            HessianFlowError: the run directory is in use or cannot be written; the loss stopped being finite.
        """
        self._record.start({**self._config, "trainer": self._settings()})
        self._apply(self._decision)
        return self._run()

    def resume(self, run_dir: str | Path) -> History:
        """Continue an interrupted run of the same settings from its newest checkpoint to the end.

        On a CPU the weights end bit for bit as those of a run that was never interrupted.

        Raises:
            HessianFlowError: no usable checkpoint there, or one of another model or data set.
        """
        folder = Path(run_dir)
        state, warning = checkpoint.load_newest(folder / checkpoint.FOLDER)
        self.load_state_dict(state, f"checkpoint in {folder}")
        self._record.reopen(folder, state["history_bytes"])
        if warning is not None:
            self._event("fallback", warning)
        return self._run()

    def request_stop(self) -> None:
        """Ask the loop to save a checkpoint and return after the step it is in (safe in a signal handler)."""
        self._stop_requested = True

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        per_epoch = self.train_data.num_examples
        return Progress(self._examples // per_epoch, self._examples, self._updates, per_epoch, self.epochs)

    def _run(self) -> History:
        was_training = self.model.training
        total = self.epochs * self.train_data.num_examples
        bar = ProgressBar(total, self._examples, show=self.show_progress)
        try:
            while self._examples < total and not self._stop_requested:
                self.model.train()
                self._train_epoch(bar)
        finally:
            bar.close()
            self.model.train(was_training)
        if self._examples < total:
            self._event("preempted", "stopped on request before the last epoch; `hessianflow resume` continues")
            self._save()
        history, seconds = self._record.history(), self._watch.totals()
        self._record.finish(rows.summary(history, self.progress, self._decision, seconds, self._device))
        return self._record.history()

    def _train_epoch(self, bar: ProgressBar) -> None:
        for batch in self.train_data:
            result = self._step(batch)
            if bar.advance(result.examples):
                self._show(bar)
            at_end = self._examples % self.train_data.num_examples == 0
            if at_end:
                self._check_finite()
            self._control(at_end)
            if at_end:
                self._finish_epoch()
            since = self._examples - self._saved_at
            if at_end or (self.checkpoint_examples is not None and since >= self.checkpoint_examples):
                self._check_finite()
                self._save()
            if self._stop_requested:
                return

    def _step(self, batch: Batch) -> BatchResult:
        with self._watch.part("training"):
            inputs, targets = move(batch, self._device, non_blocking=True)
            if self.transform is not None:
                inputs, targets = self.transform(inputs, targets, self.progress)
            share = self._decision.adversarial_share
            if self.adversary is not None and share > 0:
                with self._watch.part("adversary"):
                    size = self._accumulate.microbatch_size
                    inputs = self.adversary.perturb(self.model, inputs, targets, share, size)
            result = self._accumulate((inputs, targets))
            self._accumulate.scaler.step(self.optimizer)
            self._accumulate.scaler.update()
            if self.adversary is not None:
                self.adversary.after_step(self.model)
        steps_before = self._examples // self.reference_batch_size
        self._examples += result.examples
        self._updates += 1
        self._totals.add(result, self._updates, self._decision, self._rate.value)
        if self.schedule_unit == "reference_batch":
            for _ in range(self._examples // self.reference_batch_size - steps_before):
                self._rate.step()
        return result

    def _control(self, at_end: bool) -> None:
        controller, progress = self.controller, self.progress
        due = controller is not None and controller.is_due(progress)
        needed = due and controller is not None and "eigenvalue" in controller.needs
        reading = None
        if self.probe is not None and (needed or (at_end and self.curvature == "epoch")):
            with self._watch.part("curvature"):
                reading = self._reading = self.probe()
        decision = self._decision
        if due and controller is not None:
            signals = {name: value for observer in self.observers for name, value in observer.signals().items()}
            decision = controller.update(progress, reading, signals)
        changed = _settings(decision) != _settings(self._decision)
        if reading is not None:
            self._record.write(rows.reading_row(progress, reading, "" if changed else decision.reason))
        if changed:
            self._record.write(rows.decision_row(progress, self._decision, decision))
            self._apply(decision)

    def _apply(self, decision: Decision) -> None:
        self._decision = decision
        self.train_data.set_batch_size(decision.batch_size)
        self._rate.set_factor(decision.lr_factor)

    def _finish_epoch(self) -> None:
        evaluation = None
        if self.eval_data is not None:
            with self._watch.part("evaluation"):
                evaluation = evaluate(self.model, self.eval_data, self.loss_fn)
        row = self._totals.epoch_row(self.progress, evaluation, self._watch.totals())
        self._record.write(row)
        self._totals.start_epoch(self._watch.totals())
        if self.schedule_unit == "epoch":
            self._rate.step(row["train_loss"] if evaluation is None else evaluation.loss)
        accuracy = row["eval_accuracy"]
        if accuracy is not None and (self._best is None or accuracy > self._best):
            self._best = accuracy
            self._save(checkpoint.BEST)

    def _show(self, bar: ProgressBar) -> None:
        self._check_finite()  # the figures leave the device here anyway
        loss, accuracy = self._totals.means()
        bar.show(
            f"epoch {min(self.progress.epoch + 1, self.epochs)}/{self.epochs}",
            batch=self._decision.batch_size,
            lr=self._rate.value,
            loss=loss,
            acc=accuracy,
            eig=None if self._reading is None else self._reading.eigenvalue,
        )

    def _check_finite(self) -> None:
        update = self._totals.first_bad_update()
        if update is None:
            return
        self._event("diverged", f"the training loss was not finite at update {update}")
        epoch = (self._examples - 1) // self.train_data.num_examples + 1
        raise HessianFlowError(
            f"the training loss was not finite in epoch {epoch} at update {update} (learning rate "
            f"{self._rate.value:g}, batch {self._decision.batch_size}): lower the rate or the largest batch; "
            f"{self._record.last_checkpoint()}"
        )

    def _event(self, event: str, message: str) -> None:
        self._record.write(rows.event_row(self.progress, event, message))

    def _save(self, name: str = checkpoint.LAST) -> None:
        if name == checkpoint.LAST:
            self._saved_at = self._examples
        if self._record.run_dir is not None:
            with self._watch.part("checkpoint"):
                checkpoint.save(self._record.run_dir / checkpoint.FOLDER / name, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to continue as if it had never stopped: tensors and plain values."""
        parts = {name: getattr(self, name) for name in _STATEFUL}
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{name: None if part is None else part.state_dict() for name, part in parts.items()},
            "rate": self._rate.state_dict(),
            "observers": [observer.state_dict() for observer in self.observers],
            "scaler": self._accumulate.scaler.state_dict(),
            "totals": self._totals.state_dict(),
            "generators": checkpoint.generator_states(),
            "examples": self._examples,
            "updates": self._updates,
            "saved_at": self._saved_at,
            "best": self._best,
            "decision": dict(vars(self._decision)),
            "seconds": self._watch.totals(),
            "history_bytes": self._record.history_bytes,
        }

    def load_state_dict(self, state: Mapping[str, Any], source: str = "the checkpoint") -> None:
        """Continue from :meth:`state_dict` of a trainer of the same settings; `source` names it in errors."""
        checkpoint.load_model(self.model, state["model"], source)
        self.optimizer.load_state_dict(state["optimizer"])
        for name in _STATEFUL:
            part = getattr(self, name)
            if (part is None) != (state[name] is None):
                raise HessianFlowError(f"{source} was made {'with' if part is None else 'without'} a {name}")
            if part is not None:
                part.load_state_dict(state[name])
        self._rate.load_state_dict(state["rate"])
        for observer, inner in zip(self.observers, state["observers"], strict=True):
            observer.load_state_dict(inner)
        self._accumulate.scaler.load_state_dict(state["scaler"])
        self._totals.load_state_dict(state["totals"])
        self._examples, self._updates, self._best = state["examples"], state["updates"], state["best"]
        self._saved_at = state["saved_at"]
        self._watch.load(state["seconds"])
        self._apply(Decision(**state["decision"]))
        checkpoint.restore_generators(state["generators"])

    def _settings(self) -> dict[str, Any]:
        return {
            "model": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "optimizer": type(self.optimizer).__name__,
            "controller": None if self.controller is None else type(self.controller).__name__,
            "adversary": None if self.adversary is None else type(self.adversary).__name__,
            "epochs": self.epochs,
            "examples_per_epoch": self.train_data.num_examples,
            "reference_batch_size": self.reference_batch_size,
            "microbatch_size": self._accumulate.microbatch_size,
            "precision": self._accumulate.precision,
            "device": str(self._device),
        }


_STATEFUL = ("train_data", "controller", "adversary", "probe")


def _settings(decision: Decision) -> tuple[int, float, float]:
    return decision.batch_size, decision.lr_factor, decision.adversarial_share


def _check(model: nn.Module, optimizer: Optimizer, batch_size: int, num_examples: int, epochs: int) -> None:
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if not trained:
        raise HessianFlowError("the model has no trainable parameter: nothing to train")
    if not any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
        raise HessianFlowError("the optimizer holds no trainable parameter of the model: build it from this model")
    if epochs < 1:
        raise HessianFlowError(f"epochs must be at least 1, got {epochs}")
    if not 1 <= batch_size <= num_examples:
        raise HessianFlowError(f"batch size {batch_size} must lie between 1 and the {num_examples} training examples")
