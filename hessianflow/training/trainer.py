"""The training loop: batches whose size a controller sets, an adversary, and curvature, around any optimizer.

The trainer knows protocols only (:mod:`hessianflow.interfaces`). One step: next batch at the current size -> batch
transform -> adversary -> gradient in microbatches, each weighted by its examples -> optimizer step ->
`adversary.after_step` -> progress counted in examples -> if the controller is due: probe -> reading ->
`controller.update` -> decision applied and recorded.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hessianflow.interfaces import (
    Adversary,
    Batch,
    BatchController,
    BatchTransform,
    CurvatureProbe,
    Decision,
    GradientObserver,
    HessianFlowError,
    LossFn,
    Progress,
    RecordSink,
    ResizableBatches,
)
from hessianflow.measuring import unwrap
from hessianflow.training import checkpoint, rows
from hessianflow.training.accumulate import GradientAccumulator, Precision
from hessianflow.training.checks import check_data, check_run, check_signals
from hessianflow.training.control_point import ControlPoint, CurvatureSchedule
from hessianflow.training.divergence import DivergenceError, DivergencePolicy, OnDivergence, hold
from hessianflow.training.evaluate import evaluate
from hessianflow.training.ghost_norm import ghost_normalisation
from hessianflow.training.learning_rate import LearningRate, ScheduleUnit
from hessianflow.training.lookahead import Lookahead, check_staleness
from hessianflow.training.microbatch import MicrobatchSize
from hessianflow.training.progress import ProgressBar
from hessianflow.training.record import History, RunRecord, history_length
from hessianflow.training.saving import Saver
from hessianflow.training.state import RunState
from hessianflow.training.step import TrainingStep
from hessianflow.training.timing import Stopwatch
from hessianflow.training.totals import RunningTotals

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
    ) -> None:
        check_data(train_data)
        decision = Decision(train_data.batch_size) if controller is None else controller.decision
        check_signals(controller, probe is not None, train_data.num_examples)
        check_run(model, optimizer, decision.batch_size, train_data.num_examples, epochs)
        self.model, self.train_data, self.eval_data, self.loss_fn = model, train_data, eval_data, loss_fn
        self.controller, self.before_evaluation = controller, before_evaluation
        self.epochs, self.schedule_unit, self.show_progress = epochs, schedule_unit, show_progress
        self._saver = Saver(checkpoint_examples, checkpoint_minutes, keep_checkpoints)
        self._policy = DivergencePolicy(on_divergence, max_rollbacks)
        self.reference_batch_size = reference_batch_size or decision.batch_size
        self.norm_batch_size = self.reference_batch_size if norm_batch_size is None else norm_batch_size or None
        device = next(model.parameters()).device
        self._watch = Stopwatch(device)
        self._control = ControlPoint(controller, probe, tuple(observers), curvature, self._watch)
        self._totals = RunningTotals(device, self._watch.totals())
        self._rate = LearningRate(optimizer, scheduler, schedule_unit)
        trained = _trained(model, optimizer)
        accumulate = GradientAccumulator(model, loss_fn, trained, observers, precision, self.norm_batch_size)
        if microbatch_size is None:
            microbatch_size = "auto" if device.type == "cuda" else self.reference_batch_size
        self._microbatch = MicrobatchSize(microbatch_size, min(AUTO_START, self.reference_batch_size), device)
        self._step = TrainingStep(
            model, optimizer, accumulate, self._microbatch, adversary, transform, self._watch, device, max_grad_norm
        )
        depth = 0 if adversary is None else adversary.staleness
        check_staleness(depth, decision.batch_size, train_data.num_examples, epochs)
        self._ahead = Lookahead(train_data, depth, self._step.load, device, self._watch)
        parts: dict[str, Any] = {
            "train_data": train_data,
            # Before the adversary: its attacks under way end first, when states are taken as when they are put back.
            "look-ahead": self._ahead if depth else None,
            "controller": controller,
            "adversary": adversary,
            "probe": probe,
            "learning rate": self._rate,
            "loss scale": accumulate.scaler,
            "totals": self._totals,
            "microbatch": self._microbatch,
            "loss": loss_fn if isinstance(loss_fn, nn.Module) else None,
        }
        parts |= {f"observer {number}": observer for number, observer in enumerate(observers)}
        self._state = RunState(model, optimizer, parts, self._watch)
        self._record = RunRecord(run_dir, sinks)
        self._config = dict(config or {})
        self._decision = decision
        self._stop_requested = False

    def fit(self) -> History:
        """Train for `epochs` epochs and return the records.

        Raises:
            HessianFlowError: the run directory is in use or cannot be written; the loss stopped being finite.
        """
        if self._policy.mode == "rollback" and self._record.run_dir is None:
            raise HessianFlowError('on_divergence="rollback" goes back to checkpoints: it needs a run_dir')
        self._record.start({**self._config, "trainer": self._settings()})
        self._apply(self._decision)
        if not checkpoint.all_finite(self._step.accumulate.parameters):
            raise HessianFlowError("the model's weights are not finite before the first step")
        self._save()
        return self._run()

    def resume(self, run_dir: str | Path) -> History:
        """Continue an interrupted run of the same settings from its newest checkpoint to the end.

        On a CPU the weights end bit for bit as those of a run that was never interrupted.

        Raises:
            HessianFlowError: no usable checkpoint there, or one of another model or data set.
        """
        folder = Path(run_dir)
        state, warning = checkpoint.load_newest(folder / checkpoint.FOLDER, history_length(folder))
        self.load_state_dict(state, f"the checkpoint in {folder}")
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
        per_epoch, counters = self.train_data.num_examples, self._state.counters
        return Progress(counters.examples // per_epoch, counters.examples, counters.updates, per_epoch, self.epochs)

    def _run(self) -> History:
        modes = [(module, module.training) for module in self.model.modules()]
        # A buffer may hold infinities of its own (an attention mask): watch what is finite now, and every weight.
        buffers = [buffer for buffer in self.model.buffers() if checkpoint.all_finite([buffer])]
        self._watched = [*self._step.accumulate.parameters, *buffers]
        total = self.epochs * self.train_data.num_examples
        bar = ProgressBar(total, self._state.counters.examples, show=self.show_progress)
        try:
            if not self.model.training:  # in training mode already: layers that the user froze stay as they are
                self.model.train()
            with ghost_normalisation(self.model, self.norm_batch_size):
                while self._state.counters.examples < total and not self._stop_requested:
                    try:
                        self._train(bar)
                    except DivergenceError as error:
                        self._roll_back(error)
        finally:
            bar.close()
            self._record.close()
            self._stop_requested = False
            for module, training in modes:
                module.training = training
        device, seconds = self._step.device, self._watch.totals()
        self._record.finish(rows.summary(self._record.history(), self.progress, self._decision, seconds, device))
        return self._record.history()

    def _train(self, bar: ProgressBar) -> None:
        """The steps from here to the end of the run, or to a stop."""
        counters = self._state.counters
        for now, ahead in self._ahead.plan(lambda: (self.progress, self._decision)):
            self._rate.set_factor(now.decision.lr_factor)
            result = self._step(now, ahead)
            counters.examples += result.examples
            counters.updates += 1
            self._totals.add(result, counters.updates, now.decision, self._rate.value)
            if self.schedule_unit == "reference_batch":
                self._rate.advance(result.examples / self.reference_batch_size)
            if bar.advance(result.examples):
                self._show(bar)
            at_end = counters.examples % self.train_data.num_examples == 0
            stop = self._stop_requested
            save = at_end or stop or self._saver.is_due(counters.examples - counters.saved_at)
            if save:
                self._check_divergence()
            self._decide(at_end)
            if at_end:
                self._finish_epoch()
            if stop and self.progress.epoch < self.epochs:
                self._event("preempted", "stopped on request before the last epoch; `hessianflow resume` continues")
            if save:
                self._save()
            if stop:
                return

    def _decide(self, at_end: bool) -> None:
        progress, before = self.progress, self._decision
        figures = {
            "train_loss": self._totals.last_loss,
            "epoch_loss": lambda: self._totals.means()[0],
            "learning_rate": lambda: self._rate.value,
        }
        outcome = self._control(progress, at_end, figures)
        after = before if outcome.decision is None else hold(outcome.decision, self._state.counters.batch_cap)
        changed = after.setting != before.setting
        if outcome.signals:
            self._record.write(rows.signals_row(progress, outcome.signals))
        if outcome.reading is not None:
            self._record.write(rows.reading_row(progress, outcome.reading, "" if changed else after.reason))
        # A warm-up moves the rate at every step: its row can wait for the end of the epoch.
        if changed and (at_end or after.setting[::2] != before.setting[::2]):
            self._record.write(rows.decision_row(progress, before, after))
        if changed:
            self._apply(after)

    def _apply(self, decision: Decision) -> None:
        self._decision = decision
        if decision.batch_size != self.train_data.batch_size:
            self.train_data.set_batch_size(decision.batch_size)
        self._rate.set_factor(decision.lr_factor)

    def _finish_epoch(self) -> None:
        evaluation = None
        with self._watch.part("evaluation"):
            if self.before_evaluation is not None:
                self.before_evaluation()
            if self.eval_data is not None:
                evaluation = evaluate(self.model, self.eval_data, self.loss_fn)
        row = self._totals.epoch_row(self.progress, evaluation, self._watch.totals())
        self._record.write(row)
        self._totals.start_epoch(self._watch.totals())
        if self.schedule_unit == "epoch":
            self._rate.step(row["train_loss"] if evaluation is None else evaluation.loss, row["eval_accuracy"])
        accuracy, counters = row["eval_accuracy"], self._state.counters
        if accuracy is not None and (counters.best is None or accuracy > counters.best):
            counters.best = accuracy
            self._save(checkpoint.BEST)

    def _show(self, bar: ProgressBar) -> None:
        self._check_divergence()  # the figures leave the device here anyway
        loss, accuracy = self._totals.means()
        bar.show(
            f"epoch {min(self.progress.epoch + 1, self.epochs)}/{self.epochs}",
            batch=self._decision.batch_size,
            lr=self._rate.value,
            loss=loss,
            acc=accuracy,
            eig=None if self._control.last_reading is None else self._control.last_reading.eigenvalue,
        )

    def _check_divergence(self) -> None:
        update = self._totals.first_bad_update()
        if update is None and checkpoint.all_finite(self._watched):
            return
        update = update or self._state.counters.updates
        epoch = (self._state.counters.examples - 1) // self.train_data.num_examples + 1
        where = f"the training loss or a weight was not finite, or exploded, in epoch {epoch} at update {update}"
        self._event("diverged", where)
        raise DivergenceError(
            f"{where} (learning rate {self._rate.value:g}, batch {self._decision.batch_size}): lower the rate or the "
            f"largest batch; {self._record.last_checkpoint()}"
        )

    def _roll_back(self, error: DivergenceError) -> None:
        """Go back to the last checkpoint with the last growth undone, or raise the error where that is not possible."""
        counters, folder = self._state.counters, self._record.run_dir
        cap = self._policy.cap(self._record.history().growths, counters.rollbacks, counters.batch_cap)
        if cap is None or folder is None:
            raise error
        rollbacks, seconds = counters.rollbacks + 1, self._watch.totals()
        state, warning = checkpoint.load_newest(folder / checkpoint.FOLDER, self._record.sync())
        self.load_state_dict(state, f"the checkpoint in {folder}")
        self._watch.load(seconds)  # the time is spent all the same
        self._totals.forget_divergence()
        if warning is not None:
            self._event("fallback", warning)
        self._state.counters.rollbacks, self._state.counters.batch_cap = rollbacks, cap
        self._event("rollback", f"back to {self.progress.examples} examples; batch held at {cap} from now on")
        held = hold(self._decision, cap)
        self._record.write(rows.decision_row(self.progress, self._decision, held))
        self._apply(held)

    def _event(self, event: str, message: str) -> None:
        self._record.write(rows.event_row(self.progress, event, message))

    def _save(self, name: str = checkpoint.LAST) -> None:
        if name == checkpoint.LAST:
            self._state.counters.saved_at = self._state.counters.examples
        if self._record.run_dir is not None:
            with self._watch.part("checkpoint"):
                self._saver.save(self._record.run_dir, self.state_dict(), name)

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to continue as if it had never stopped: tensors and plain values."""
        return self._state.capture(self._decision, self._record.sync())

    def load_state_dict(self, state: Mapping[str, Any], source: str = "the checkpoint") -> None:
        """Continue from :meth:`state_dict` of a trainer of the same settings; `source` names it in errors."""
        self._apply(self._state.restore(state, source))

    def _settings(self) -> dict[str, Any]:
        return {
            "model": type(unwrap(self.model)).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "optimizer": type(self._step.optimizer).__name__,
            "controller": None if self.controller is None else type(self.controller).__name__,
            "adversary": None if self._step.adversary is None else type(self._step.adversary).__name__,
            "epochs": self.epochs,
            "examples_per_epoch": self.train_data.num_examples,
            "reference_batch_size": self.reference_batch_size,
            "microbatch_size": self._microbatch.size,
            "norm_batch_size": self.norm_batch_size,
            "precision": self._step.accumulate.precision,
            "device": str(self._step.device),
        }


def _trained(model: nn.Module, optimizer: Optimizer) -> list[nn.Parameter]:
    """The model's trainable parameters, then others that the optimizer holds (those of a loss, say)."""
    held = [*model.parameters(), *(p for group in optimizer.param_groups for p in group["params"])]
    return list(dict.fromkeys(p for p in held if p.requires_grad))
