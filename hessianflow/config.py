"""The settings of a run: as given (:class:`TrainConfig`) and resolved (:class:`RunConfig`).

A setting that is left open is None in the former; :func:`hessianflow.resolve.resolve` makes the
latter of it, once. config.json holds the resolved settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

from hessianflow.bounds import (
    LARGEST,
    MOST,
    Count,
    CountOrNone,
    Epochs,
    EpochTime,
    Processes,
    Range,
    Rate,
    Seed,
    check_setting,
    option,
)
from hessianflow.contradictions import check_together
from hessianflow.effects import check_effects
from hessianflow.interfaces import HessianFlowError, NormMode
from hessianflow.methods import KINDS, Choice, choice

__all__ = ["RunConfig", "TrainConfig", "from_dict", "hints", "option", "to_dict"]

PrecisionName = Literal["auto", "float32", "bf16", "fp16"]
LRRuleName = Literal["linear", "sqrt", "none"]
ResolutionName = Literal["cyclic", "once", "uniform"]
LogLevelName = Literal["debug", "info", "warning", "error"]

CHOSEN = ("controller", "adversary", "optimizer", "schedule")
"""Settings that choose a method, each of the kind of the same name."""
_MAY_BE_OPEN = ("adversary", "schedule")
"""Those of them that may be left to what the controller prefers."""


def _of(group: str, default: Any = None) -> Any:
    """Return a field of a group of settings, under which the help lists it."""
    return field(default=default, metadata={"group": group})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of `hessianflow train`, as given; None is left open where it is the default.

    The methods (controller, adversary, optimizer, schedule) may be given by name, as a mapping
    {"name": "absa", "patience": 5}, or as a :class:`~hessianflow.methods.Choice`.

    Attributes:
        data: data set by name. digits comes with scikit-learn, fake is made up, all others are read
            from data_dir; folder is any tree of class folders below train and val.
        data_dir: folder that holds the data set's official files, or their archive.
        train_examples: use only this many training examples; default: all.
        test_examples: use only this many test examples; default: all.
        loader_workers: processes that load images from a tree of folders; all other data sets are
            held on the device.
        image_size: pixels a side that images of imagenet and folder are cut to; default: 224, for
            folder no more than the shorter side of most files.
        augment: crop and flip training images at random, where that is usual for the data set.
        model: network by name (see hf.models.names()); package.module:function of your own, code
            that is looked for in the working directory too and will be run; or timm/NAME or
            torchvision/NAME where that is installed; default: that of the data set.
        controller: method that decides the batch size.
        adversary: method that attacks a share of every batch; none: train on clean examples.
            Default: fgsm, unless the controller trains without.
        optimizer: method that takes a step.
        schedule: course of the learning rate, below the controller's factor; default: what the
            controller prefers, else that of the data set.
        batch_size: examples per optimizer step at the start, over all processes; the learning rate
            is stated for it.
        max_batch_size: cap for growing batches.
        epochs: passes over the training data.
        lr: learning rate at batch_size; default: one of the data set for sgd, 0.001 for adam and
            adamw, on digits one for every optimizer; lars, clars and lamb need it elsewhere.
        warmup_epochs: epochs over which the rate rises linearly from 0 to the schedule's.
        lr_rule: how the rate follows the batch; default: sqrt for adam, adamw and lamb where the
            controller scales the rate, else as the controller has it (linear for absa).
        max_lr_factor: cap on what the rate is multiplied by, with lr_rule.
        resolution: train at lower resolutions first. cyclic: from low to high within every stretch
            of constant learning rate; once: one resolution a stretch; uniform: in equal parts,
            whatever the rate; default: full resolution throughout.
        resolutions: pixels a side, increasing, e.g. "[24, 32]"; the last is that of the data;
            default: three quarters of it, then all.
        resolution_batch_sizes: examples per step that go with each resolution, e.g. "[600, 560]":
            the controller's size is multiplied by the size here over the last one; default: the
            same at every resolution.
        dropouts: dropout before the last linear layer at each resolution, e.g. "[0.1, 0.2]"; with
            conadv only at staleness 0; default: none.
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
        norm_mode: statistics of batch normalisation in curvature measurements. eval: the running
            ones; batch: those of the batch measured. Default: what the controller prefers, else
            eval.
        overfitting_alarm: after every epoch record the accuracy under fgsm and pgd on 256 test
            examples, and warn when that under pgd collapses while that under fgsm does not.
        input_curvature: after every epoch record the top eigenvalue of the Hessian by the inputs,
            on 16 test examples.
        microbatch_size: examples per forward pass; auto finds the fastest; default: auto on a GPU,
            else batch_size.
        norm_batch_size: examples batch normalisation sees at once in training; default: batch_size;
            0: the microbatch; ranks: those of all ranks (torch's SyncBatchNorm, on GPUs).
        norm_statistics: settled: running statistics of batch normalisation that have not settled at
            the end of an epoch are measured again, and readings on such ones are not used; running:
            neither, as in the published code of ABSA.
        split_norm: give the adversarial twins of conadv batch-normalisation statistics and
            parameters of their own; default: where the model has batch normalisation.
        precision: float32, or autocast in bf16 or fp16; auto takes bf16 where the device computes
            in it.
        channels_last: memory layout of images and convolutions; the faster one on most devices.
        compile: compile the model with torch.compile, for batches of any size.
        deterministic: only algorithms that repeat bit for bit on a GPU; an error where torch has
            none.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        threads: processor threads of torch; default: torch's own choice, 1 for digits.
        seed: seed of initialisation, data order, augmentation, attack and probe, each in a stream
            of its own.
        elastic: train on Ray, with as many workers as the batch deserves, between min_workers and
            max_workers.
        min_workers: fewest workers of an elastic run; default: 1.
        max_workers: most workers of an elastic run; default: 8.
        ray_address: address of a Ray cluster; default: a local one.
        checkpoint_examples: save a checkpoint also each time this many examples have been trained.
        checkpoint_minutes: save a checkpoint also each time this many minutes have passed.
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

    data: str = _of("data", "digits")
    data_dir: str | None = _of("data")
    train_examples: Count | None = _of("data")
    test_examples: Count | None = _of("data")
    loader_workers: Annotated[int, Range(0, 256)] = _of("data", 0)
    image_size: Annotated[int, Range(1, 4096)] | None = _of("data")
    augment: bool = _of("data", True)
    model: str | None = _of("training")
    controller: Choice = _of("training", Choice("absa"))
    adversary: Choice | None = _of("training")
    optimizer: Choice = _of("training", Choice("sgd"))
    schedule: Choice | None = _of("training")
    batch_size: Count | None = _of("training")
    max_batch_size: Count | None = _of("training")
    epochs: Epochs | None = _of("training")
    lr: Rate | None = _of("training")
    warmup_epochs: EpochTime = _of("training", 0.0)
    lr_rule: LRRuleName | None = _of("training")
    max_lr_factor: Annotated[float, Range(1e-6, LARGEST)] | None = _of("training")
    resolution: ResolutionName | None = _of("resolution")
    resolutions: tuple[CountOrNone, ...] | None = _of("resolution")
    resolution_batch_sizes: tuple[CountOrNone, ...] | None = _of("resolution")
    dropouts: tuple[float, ...] | None = _of("resolution")
    curvature: Literal["epoch", "needed", "off"] = _of("curvature", "epoch")
    probe_examples: Count | None = _of("curvature")
    probe_tolerance: Annotated[float, Range(1e-7, 1)] = _of("curvature", 1e-2)
    curvature_budget: Annotated[float, Range(1e-6, 1000)] | None = _of("curvature")
    norm_mode: NormMode | None = _of("curvature")
    overfitting_alarm: bool = _of("curvature", False)
    input_curvature: bool = _of("curvature", False)
    microbatch_size: Count | Literal["auto"] | None = _of("passes through the network")
    norm_batch_size: CountOrNone | Literal["ranks"] | None = _of("passes through the network")
    norm_statistics: Literal["settled", "running"] = _of("passes through the network", "settled")
    split_norm: bool | None = _of("passes through the network")
    precision: PrecisionName | None = _of("passes through the network")
    channels_last: bool | None = _of("passes through the network")
    compile: bool = _of("passes through the network", False)
    deterministic: bool = _of("passes through the network", False)
    device: str = _of("machine", "auto")
    threads: Processes | None = _of("machine")
    seed: Seed = _of("machine", 0)
    elastic: bool = _of("machine", False)
    min_workers: Processes | None = _of("machine")
    max_workers: Processes | None = _of("machine")
    ray_address: str | None = _of("machine")
    checkpoint_examples: Count | None = _of("checkpoints and records")
    checkpoint_minutes: Annotated[float, Range(0, MOST)] | None = _of("checkpoints and records")
    keep_checkpoints: Annotated[int, Range(1, 1000)] = _of("checkpoints and records", 2)
    on_divergence: Literal["stop", "rollback"] = _of("checkpoints and records", "stop")
    max_rollbacks: CountOrNone = _of("checkpoints and records", 3)
    run_dir: str | None = _of("checkpoints and records")
    tensorboard: bool = _of("checkpoints and records", False)
    log_level: LogLevelName | None = _of("checkpoints and records")
    plots: bool = _of("checkpoints and records", True)

    def __post_init__(self) -> None:
        for name in CHOSEN:
            given = getattr(self, name)
            if given is not None or name not in _MAY_BE_OPEN:
                object.__setattr__(self, name, chosen(name, given))
        for name, hint in hints().items():
            if name not in CHOSEN:
                check_setting(name, getattr(self, name), hint)
        check_together(self)
        check_effects(self, _wishes(self))


@dataclass(frozen=True)
class RunConfig(TrainConfig):
    """The settings of a run, resolved: every choice is made, with a value for each of its options.

    Attributes are those of :class:`TrainConfig`. What may still be None has "none" as a meaning.
    """

    model: str = ""
    adversary: Choice = Choice("none")
    schedule: Choice = Choice("constant")
    batch_size: int = 1
    max_batch_size: int = 1
    epochs: int = 1
    lr: float = 0.0
    probe_examples: int = 1
    norm_mode: NormMode = "eval"
    precision: PrecisionName = "float32"
    channels_last: bool = False

    @property
    def is_dual_batch(self) -> bool:
        """Whether workers train apart, on a parameter server."""
        return self.controller.name == "dual-batch"


_NEVER_FILLED = (
    "resolutions",
    "resolution_batch_sizes",
    "dropouts",
    "split_norm",
    "min_workers",
    "max_workers",
    "ray_address",
)
"""Settings that no preset fills unless they have an effect: wishes, wherever they come from."""
_NOT_ON_A_SERVER = (
    "checkpoint_examples",
    "checkpoint_minutes",
    "on_divergence",
    "lr_rule",
    "curvature_budget",
)
"""Settings that no preset fills for a run with a parameter server."""


def _wishes(config: TrainConfig) -> list[str]:
    """Return the settings whose value is somebody's wish."""
    found = list(_NEVER_FILLED)
    if config.controller.name == "dual-batch":
        usual = {setting.name: setting.default for setting in fields(TrainConfig)}
        found += [name for name in _NOT_ON_A_SERVER if getattr(config, name) != usual[name]]
    return found


def chosen(name: str, given: Any) -> Choice:
    """Return the choice of a method as given for the setting `name`.

    Raises:
        HessianFlowError: an unknown method or option.
    """
    if name == "adversary" and given in ("none", {"name": "none"}, Choice("none")):
        return Choice("none")
    return choice(KINDS[name], given, name)


@cache
def hints() -> Mapping[str, Any]:
    """Return the type of every setting, with its bounds."""
    found = get_type_hints(TrainConfig, include_extras=True)
    return {setting.name: found[setting.name] for setting in fields(TrainConfig)}


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return plain values for config.json."""
    return {setting.name: _plain(getattr(config, setting.name)) for setting in fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Choice):
        return value.to_dict()
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def from_dict(settings: Mapping[str, Any], source: str) -> TrainConfig:
    """Return the settings that :func:`to_dict` wrote, or that stand in a file.

    Raises:
        HessianFlowError: an unknown setting, a value of another type, or one out of bounds;
            `source` names the file.
    """
    unknown = sorted(settings.keys() - hints().keys())
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
