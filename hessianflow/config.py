"""The settings of a run: frozen, validated, complete.

A field left at None takes the value of its data set's preset when the configuration is resolved
(:func:`resolve`); from there on only resolved values are used, and config.json holds them.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any, Literal, get_type_hints

from hessianflow.bounds import check_setting, option, user_path
from hessianflow.contradictions import check_resolved, check_together
from hessianflow.effects import check_effects
from hessianflow.interfaces import HessianFlowError, NormMode
from hessianflow.presets import ADAPTIVE, PRESETS, RATES
from hessianflow.settings import (
    FILE_SIDE,
    NOT_ON_A_SERVER,
    SIDES,
    DualBatchSettings,
    ResolutionSettings,
    TwinSettings,
    WorkerSettings,
)

__all__ = ["TrainConfig", "from_dict", "option", "resolve", "to_dict"]

DataName = Literal[
    "digits", "fake", "cifar10", "cifar100", "svhn", "tiny-imagenet", "imagenet", "folder"
]
ControllerName = Literal[
    "absa",
    "abs",
    "fixed",
    "warmup",
    "adabatch",
    "grow-instead-of-decay",
    "noise-scale",
    "cabs",
    "divebatch",
    "critical",
    "timed",
    "dual-batch",
]
AdversaryName = Literal["fgsm", "pgd", "conadv", "reuse", "none"]
OptimizerName = Literal["sgd", "adam", "adamw", "lars", "clars", "lamb"]
ScheduleName = Literal["constant", "multistep", "cosine", "polynomial", "cooldown"]
CurvatureName = Literal["epoch", "needed", "off"]
PrecisionName = Literal["auto", "float32", "bf16", "fp16"]
LRRuleName = Literal["linear", "sqrt", "none"]
DivergenceName = Literal["stop", "rollback"]
NormStatisticsName = Literal["settled", "running"]
LogLevelName = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True)
class TrainConfig(WorkerSettings, DualBatchSettings, ResolutionSettings, TwinSettings):
    """Every setting of `hessianflow train`, beside those of the classes it extends.

    Attributes:
        data: data set by name; digits comes with scikit-learn, fake is made up, all others are read
            from data_dir.
        data_dir: folder that holds the data set's official files, or their archive; folder: any
            tree of class folders below train and val.
        train_examples: use only so many training examples; default: all.
        test_examples: use only so many test examples; default: all.
        loader_workers: processes that load images from a tree of folders; the other sets are held
            on the device.
        image_size: pixels a side that images of imagenet and folder are cut to; default: 224, but
            for folder no more than the shorter side of most files.
        model: network by name (see hf.models.names()); package.module:function of your own, code
            that is looked for in the working directory too and will be run; or timm/NAME or
            torchvision/NAME where that is installed; default: digits-cnn for digits, resnet20 or
            resnet18 otherwise.
        controller: who decides the batch size. absa: the top eigenvalue, or patience; abs: the same
            without adversary; fixed: batch_size throughout; warmup: max_batch_size from the start,
            with a rate that rises to linear scaling; adabatch: growth every so many epochs;
            grow-instead-of-decay: growth by 1/lr_decay at the milestones; noise-scale, cabs,
            divebatch: from the variance of the gradients; critical: ours, from the loss and the
            distance to the edge of stability, under a cooldown schedule; timed: as the stages say;
            dual-batch: some workers with a small batch and some with batch_size, on a parameter
            server, without adversary.
        adversary: what is done to a share of every batch. fgsm, pgd: attacked in place; conadv:
            trained on besides its adversarial twins, made staleness steps ahead; reuse: moved along
            the gradients of its last visit, which cost no pass of their own (not for folder).
        optimizer: how a step is taken.
        sam_rho: sharpness-aware minimisation around that optimizer, with this radius (usually
            0.05): two gradients a step; 0: none.
        batch_size: examples per optimizer step at the start; the learning rate is stated for it.
        max_batch_size: cap for growing batches.
        epochs: passes over the training data.
        lr: learning rate at batch_size; default: one of the data set for sgd, 0.001 for adam and
            adamw, on digits one for every optimizer; lars, clars and lamb need it elsewhere.
        momentum: of sgd, lars and clars.
        weight_decay: of the optimizer (0 in the published ABSA runs).
        trust_coefficient: of lars and clars; default: 0.001 and 0.01, as published.
        schedule: of the learning rate, below the controller's factor; cooldown: constant, then
            linearly to 0. Without warmup_epochs the rate is that of the start of the epoch
            throughout.
        milestones: epochs after which the multistep schedule multiplies the rate by lr_decay, e.g.
            "[30, 60]".
        lr_decay: factor of the multistep schedule (0.2 in the published ABSA runs).
        warmup_epochs: epochs over which the rate rises linearly from 0 to the schedule's; with the
            warmup controller from the rate of batch_size to that of max_batch_size, in 5 epochs by
            default.
        lr_rule: how the rate follows the batch; default: sqrt for adam, adamw and lamb where the
            rate would grow with the batch, else as the controller has it (linear for absa).
        max_lr_factor: cap on what the rate is multiplied by, with lr_rule.
        momentum_correction: lars takes the rate out of its velocity, so that a jump of the rate at
            once acts on all of it (Goyal et al., arXiv 1706.02677, section 3); the other optimizers
            always keep it outside.
        decay_factor: absa grows the batch when the eigenvalue has fallen by this factor.
        growth_factor: absa and adabatch multiply the batch by this.
        patience: absa grows after this many epochs without growth; 0 never does.
        every_epochs: adabatch grows after every so many epochs.
        edge_share: critical uses this share of the largest stable rate, which is that of SGD with
            momentum; 0: leaves that bound out. Default: 0.75 with sgd, 0 with any other optimizer.
        loss_power: critical's useful batch follows this power of the fall of the loss; 0: leaves
            that bound out.
        excess_power: critical's batch outgrows a rate that stability holds back by this power of
            the batch that is useful over the one that is stable, where both bounds are in force; 0:
            never.
        stages: timed has these batch sizes from these epochs on, e.g. "[[2, 256], [4, 512]]", the
            rate scaled with them; default: twice, 4 and 8 times the batch after 1/12, 1/6 and 1/3
            of the epochs.
        decay_from: epochs after which timed and the cooldown schedule let the rate fall linearly,
            to 0 at the end; default: for cooldown two thirds; for timed never, but with the stages
            left open too, after the last.
        adversarial_share: share of each batch that is attacked at the start; default: 0.2, for
            conadv 1.
        share_decay: absa divides the share by this at each growth.
        eps: size of the perturbation, in the units of pixels scaled to [0, 1].
        overfitting_alarm: after every epoch record the accuracy under fgsm and pgd at eps on 256
            test examples, and warn when that under pgd collapses while that under fgsm does not.
        input_curvature: after every epoch record the top eigenvalue of the Hessian by the inputs,
            on 16 test examples.
        curvature: when the top Hessian eigenvalue is measured; every epoch, when the controller
            needs it, or never.
        probe_examples: training examples the curvature is measured on; default: 128 for digits, 64
            otherwise (the published ABSA runs took 128: at least twice the cost, a spread of 8
            instead of 10 % between samples).
        probe_tolerance: relative residual at which an eigenvalue counts as converged.
        curvature_budget: largest share of the training cost that readings may take; an epoch whose
            reading would exceed it goes without, and counts for patience; 100 is as good as no
            limit; default: 0.01, which is a reading in nearly every epoch of 50,000 images and in
            every fifth of 10,000; no limit for digits and fake.
        norm_mode: statistics of batch normalisation in curvature measurements: the running ones
            (eval) or those of the batch measured; default: eval, but batch for critical.
        microbatch_size: examples per forward pass; auto finds the fastest; default: auto on a GPU,
            else batch_size.
        norm_batch_size: examples batch normalisation sees at once in training; default: batch_size;
            0: the microbatch; ranks: those of all ranks (torch's SyncBatchNorm, on GPUs).
        norm_statistics: settled: running statistics of batch normalisation that have not settled at
            the end of an epoch are measured anew, and readings on such ones are not used; running:
            neither, as in the published code of ABSA.
        augment: random crops and flips where the data set's preset has them.
        precision: float32, or autocast in bf16 or fp16; auto takes bf16 where the device computes
            in it.
        channels_last: memory layout of images and convolutions; the faster one on most devices.
        compile: compile the model with torch.compile, for batches of any size.
        deterministic: only algorithms that repeat bit for bit on a GPU; an error where torch has
            none.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        threads: processor threads of torch; default: torch's own choice, 1 for digits.
        seed: of initialisation, data order, augmentation, attack and probe, each in a stream of its
            own.
        checkpoint_examples: also save a checkpoint every so many examples within an epoch.
        checkpoint_minutes: also save a checkpoint every so many minutes.
        keep_checkpoints: how many of the newest checkpoints are kept.
        on_divergence: stop, or rollback to the last checkpoint, with the last growth undone and the
            batch held there.
        max_rollbacks: how often to roll back before stopping.
        run_dir: folder for records, checkpoints and plots; default: a new one below runs/.
        tensorboard: write TensorBoard files too, into the run directory (needs pip install
            'hessianflow[tensorboard]').
        log_level: what to say on standard error while training: debug adds readings to info's line
            per epoch and per decision; default: info on a terminal, else warning.
        plots: draw the plots at the end.
    """

    data: DataName = "digits"
    data_dir: str | None = None
    train_examples: int | None = None
    test_examples: int | None = None
    loader_workers: int = 0
    image_size: int | None = None
    model: str | None = None
    controller: ControllerName = "absa"
    adversary: AdversaryName = "fgsm"
    optimizer: OptimizerName = "sgd"
    sam_rho: float = 0.0
    batch_size: int | None = None
    max_batch_size: int | None = None
    epochs: int | None = None
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    trust_coefficient: float | None = None
    schedule: ScheduleName | None = None
    milestones: tuple[int, ...] | None = None
    lr_decay: float = 0.2
    warmup_epochs: float = 0.0
    lr_rule: LRRuleName | None = None
    max_lr_factor: float | None = None
    momentum_correction: bool = False
    decay_factor: float = 2.0
    growth_factor: float = 2.0
    patience: int | None = None
    every_epochs: int = 20
    edge_share: float | None = None
    loss_power: float = 1 / 0.21
    excess_power: float = 1 / 4
    stages: tuple[tuple[int, int], ...] | None = None
    decay_from: float | None = None
    adversarial_share: float | None = None
    share_decay: float = 2.0
    eps: float = 0.005
    overfitting_alarm: bool = False
    input_curvature: bool = False
    curvature: CurvatureName = "epoch"
    probe_examples: int | None = None
    probe_tolerance: float = 1e-2
    curvature_budget: float | None = None
    norm_mode: NormMode | None = None
    microbatch_size: int | Literal["auto"] | None = None
    norm_batch_size: int | Literal["ranks"] | None = None
    norm_statistics: NormStatisticsName = "settled"
    augment: bool = True
    precision: PrecisionName | None = None
    channels_last: bool | None = None
    compile: bool = False
    deterministic: bool = False
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    checkpoint_examples: int | None = None
    checkpoint_minutes: float | None = None
    keep_checkpoints: int = 2
    on_divergence: DivergenceName = "stop"
    max_rollbacks: int = 3
    run_dir: str | None = None
    tensorboard: bool = False
    log_level: LogLevelName | None = None
    plots: bool = True

    def __post_init__(self) -> None:
        for name, hint in _hints().items():
            check_setting(name, getattr(self, name), hint)
        check_together(self)
        self.check_resolution()
        self.check_twins(wanted=self.adversary == "conadv", dropouts=self.dropouts is not None)
        self.check_dual_batch()
        self.check_workers(
            adversary=self.adversary, controller=self.controller, on_divergence=self.on_divergence
        )
        check_effects(self, _never_filled(self))


@cache
def _hints() -> Mapping[str, Any]:
    """The type of every setting."""
    hints = get_type_hints(TrainConfig)
    return {field.name: hints[field.name] for field in fields(TrainConfig)}


def _never_filled(config: TrainConfig) -> list[str]:
    """Return settings whose value is somebody's wish: resolving fills them only where they have an
    effect."""
    parts = (ResolutionSettings, DualBatchSettings, TwinSettings, WorkerSettings)
    found = [field.name for part in parts for field in fields(part)]
    if config.controller == "dual-batch":
        found += [
            f.name
            for f in fields(config)
            if f.name in NOT_ON_A_SERVER and getattr(config, f.name) != f.default
        ]
    return found


_OWN_SCHEDULES = ("adabatch", "grow-instead-of-decay", "timed")
"""Controllers that move the learning rate themselves, where a schedule would decay it."""
SCALED = ("absa", "abs", "warmup", "noise-scale", "cabs", "divebatch", "critical", "timed")
"""Controllers that scale the learning rate with the batch, linearly unless told otherwise."""


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill every field that the data set's preset knows and the user left open.

    A cap left open is never below a batch size given nor above the `train_examples` given, nor are
    probe examples, and milestones left open keep their place in the run. Controllers that move the
    rate themselves get a constant schedule. A cooldown begins after two thirds of the run, rounded
    down. A `~` at the beginning of a path is the home folder.

    Raises:
        HessianFlowError: settings that do not go together once they are filled.
    """
    config = replace(
        config,
        data_dir=user_path(config.data_dir, "--data-dir"),
        run_dir=user_path(config.run_dir, "--run-dir"),
    )
    preset = _preset(config)
    filled = {name: value for name, value in preset.items() if getattr(config, name) is None}
    batch, examples = (
        config.batch_size or preset["batch_size"],
        config.train_examples or sys.maxsize,
    )
    if "max_batch_size" in filled:
        filled["max_batch_size"] = max(min(filled["max_batch_size"], examples), batch)
    elif config.max_batch_size is not None and config.max_batch_size < batch:
        raise HessianFlowError(
            f"--max-batch-size {config.max_batch_size} is below the batch size {batch} that"
            f" {config.data} runs start with: raise the cap or set --batch-size"
        )
    if "probe_examples" in filled:
        filled["probe_examples"] = min(filled["probe_examples"], examples)
    if "milestones" in filled:
        epochs = config.epochs or preset["epochs"]
        scaled = (milestone * epochs // preset["epochs"] for milestone in filled["milestones"])
        filled["milestones"] = tuple(sorted({m for m in scaled if 0 < m < epochs}))
    resolved = replace(config, **filled)
    if resolved.schedule == "cooldown" and resolved.decay_from is None:
        resolved = replace(resolved, decay_from=cooldown_start(resolved.epochs or 1))
    check_resolved(resolved)
    if config.controller == "dual-batch":
        resolved.check_plan()
    return (
        _planned(resolved) if config.controller == "timed" and config.stages is None else resolved
    )


def _preset(config: TrainConfig) -> dict[str, Any]:
    """Return what data set, optimizer and controller would have, by the names of the settings.

    Raises:
        HessianFlowError: no rate is known for the optimizer on the data set, and none is given.
    """
    preset = dict(PRESETS[config.data])
    if config.optimizer != "sgd":
        preset["lr"] = _rate(config, preset["lr"])
    if config.controller in _OWN_SCHEDULES:
        preset["schedule"] = "constant"
    preset |= {
        "norm_mode": "eval",
        "adversarial_share": 1.0 if config.adversary == "conadv" else 0.2,
    }
    if config.controller == "critical":
        # The stable rate of the bound is SGD's: of an optimizer that rescales its gradients it says
        # nothing.
        share = 0.75 if config.optimizer == "sgd" else 0.0
        preset |= {"schedule": "cooldown", "norm_mode": "batch", "edge_share": share}
    if config.optimizer in ADAPTIVE and config.controller in SCALED and not config.edge_share:
        preset["lr_rule"] = "sqrt"
    if config.resolution is not None:
        preset["resolutions"] = config.resolutions_of(config.data, config.image_size)
    if config.data not in SIDES:
        preset["image_size"] = preset.get("resolutions", (FILE_SIDE,))[-1]
    if config.controller == "dual-batch":
        preset = {name: value for name, value in preset.items() if name not in NOT_ON_A_SERVER}
        preset |= config.dual_batch_defaults()
    return preset


def _rate(config: TrainConfig, for_sgd: float) -> float | None:
    """Return the rate that is known for an optimizer on a data set, if none is given."""
    rates = RATES[config.optimizer]
    rate = rates.get(config.data, rates.get("all"))
    if rate is None and config.lr is None:
        raise HessianFlowError(
            f"--optimizer {config.optimizer} needs --lr: {for_sgd:g}, the rate of {config.data}"
            " runs, is SGD's, and no other is known"
        )
    return rate


def cooldown_start(epochs: int) -> int:
    """Return the number of epochs after which a cooldown begins by default: two thirds, but early
    enough to lower the last epoch's rate."""
    return max(0, min(epochs * 2 // 3, epochs - 2))


def _planned(config: TrainConfig) -> TrainConfig:
    """Return the settings with timed's default stages, and the decay that follows them unless
    another was asked for."""
    batch, cap, epochs = config.batch_size or 1, config.max_batch_size or 1, config.epochs or 1
    sizes = {
        -(-epochs // part): min(factor * batch, cap) for part, factor in ((12, 2), (6, 4), (3, 8))
    }
    decay_from = max(sizes) if config.decay_from is None else config.decay_from
    return replace(config, stages=tuple(sizes.items()), decay_from=decay_from)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return plain values for config.json."""
    return {key: _listed(value) for key, value in asdict(config).items()}


def _listed(value: Any) -> Any:
    return [_listed(part) for part in value] if isinstance(value, tuple) else value


def from_dict(settings: Mapping[str, Any], source: str) -> TrainConfig:
    """Return the configuration that :func:`to_dict` wrote.

    Raises:
        HessianFlowError: an unknown setting, a value of another type, or one out of bounds;
            `source` names the file.
    """
    known = {field.name for field in fields(TrainConfig)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise HessianFlowError(
            f"{source} has unknown settings {', '.join(unknown)}: made by another release?"
        )
    try:
        return TrainConfig(**{name: _tupled(value) for name, value in settings.items()})
    except HessianFlowError as error:
        raise HessianFlowError(f"{source}: {error}") from None


def _tupled(value: Any) -> Any:
    return tuple(_tupled(part) for part in value) if isinstance(value, list) else value
