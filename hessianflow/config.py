"""The settings of a run, as given (:class:`TrainConfig`) and resolved (:class:`RunConfig`).

A setting that is left open is None in a TrainConfig; :func:`hessianflow.resolve.resolve` fills it,
once. config.json holds the resolved settings.
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
    tupled,
)
from hessianflow.effects import check_effects, check_together
from hessianflow.interfaces import HessianFlowError, NormMode
from hessianflow.methods import KINDS, Choice, choice, plain

__all__ = ["RunConfig", "TrainConfig", "from_dict", "hints", "option", "to_dict"]

PrecisionName = Literal["auto", "float32", "bf16", "fp16"]
LRRuleName = Literal["linear", "sqrt", "none"]
ResolutionName = Literal["cyclic", "once", "uniform"]
LogLevelName = Literal["debug", "info", "warning", "error"]

CHOSEN = ("controller", "adversary", "optimizer", "schedule")
"""Settings that choose a method; the kind of method has the same name."""
_MAY_BE_OPEN = ("adversary", "optimizer", "schedule")
"""Settings in CHOSEN that may be left open: the data set or the controller then chooses."""


def _of(group: str, default: Any = None) -> Any:
    """Return a field in a group of settings, which is its title in the help."""
    return field(default=default, metadata={"group": group})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of `hessianflow train` as given; a default of None leaves a setting open.

    The methods (controller, adversary, optimizer, schedule) may be given by name, as a mapping
    {"name": "absa", "patience": 5}, or as a :class:`~hessianflow.methods.Choice`.

    Attributes:
        data: Data set by name. digits comes with scikit-learn, fake is random, and the others are
            read from data_dir. folder is any tree of class folders below train and val. text is any
            files, and python the source files of the standard library; a tenth of either is held
            out for testing.
        data_dir: Folder of the official files of the data set, or of their archive; for text, a
            folder of files, a pattern such as "books/*.txt", or one file.
        train_examples: Training examples to use; default: all.
        test_examples: Test examples to use; default: all, but at most 1024 blocks of text.
        loader_workers: Processes that load images from a tree of folders; other data sets are held
            on the device.
        image_size: Side in pixels that images of imagenet and folder are cut to; default: 224, but
            for folder at most the shorter side of most files.
        block_length: Bytes in each example of text and python; default: 128.
        augment: Crop and flip training images at random, if that is usual for the data set.
        model: Network by name (see hf.models.names()), timm/NAME or torchvision/NAME if that
            package is installed, or package.module:function of your own, which is also searched for
            in the working directory and is run; default: the network of the data set.
        controller: Method that decides the batch size.
        adversary: Method that attacks a share of every batch; none trains on clean examples;
            default: fgsm, or none for text and python and if the controller prefers none.
        optimizer: Method that updates the weights; default: sgd, or adamw for text and python.
        schedule: Course of the learning rate, before the factor of the controller; default: the one
            that the controller prefers, else that of the data set.
        batch_size: Examples per optimizer step at the start, over all processes; the learning rate
            is stated for this size; default: that of the data set.
        max_batch_size: Cap on the batch size; default: that of the data set.
        epochs: Passes over the training data; default: that of the data set.
        epoch_parts: Number of parts into which each pass over the data is divided, for runs of few
            passes. The run evaluates, measures, decides and saves after each part, and controllers
            count parts as epochs; default: 1.
        lr: Learning rate at batch_size; default: that of the data set for sgd, 0.001 for adam and
            adamw, and 0.24 for muon; lars, clars and lamb have a default for digits only.
        warmup_epochs: Epochs over which the rate rises linearly from 0 to that of the schedule.
        lr_rule: Rule by which the rate follows the batch; default: sqrt for adam, adamw, lamb,
            muon and for your own classes without "SGD" in their name, if the controller scales
            the rate, else that of the controller (linear for absa).
        max_lr_factor: Cap on the factor by which lr_rule multiplies the rate; default: none.
        resolution: Order of training resolutions. cyclic goes from low to high within every stretch
            of constant learning rate, once has one resolution per stretch, and uniform divides the
            run into equal parts; default: full resolution throughout.
        resolutions: Increasing sides in pixels, e.g. "[24, 32]"; the last is that of the data;
            default: three quarters of it, then all.
        resolution_batch_sizes: Examples per step for each resolution, e.g. "[600, 560]"; the size
            of the controller is multiplied by the ratio of a size here to the last one; default:
            the same at every resolution.
        dropouts: Dropout before the last linear layer at each resolution, e.g. "[0.1, 0.2]"; with
            conadv only at staleness 0; default: none.
        curvature: When to measure the top eigenvalue. epoch measures it after every epoch, needed
            only when the controller needs it, and off never.
        probe_examples: Training examples on which the curvature is measured; default: 128 for
            digits, else 64. The published ABSA runs took 128, at twice the cost or more, which
            lowers the spread between samples from 10 to 8 %.
        probe_tolerance: Relative residual at which an eigenvalue counts as converged.
        curvature_budget: Largest share of the training cost that curvature readings may take. An
            epoch whose reading would exceed it has no reading, but counts for the patience.
            Default: 0.01, which allows a reading in nearly every epoch of 50,000 images and in
            every fifth of 10,000; digits and fake have no limit, and 100 is practically no limit.
        norm_mode: Statistics of batch normalisation in curvature measurements, the running ones
            (eval) or those of the measured batch (batch); default: what the controller prefers,
            else eval.
        overfitting_alarm: Record the accuracy under fgsm and pgd on 256 test examples after every
            epoch, and warn if it collapses under pgd but not under fgsm.
        alarm_eps: Size of the attacks of overfitting_alarm, in units of pixels scaled to [0, 1];
            default: that of the adversary, or 0.005 without one.
        input_curvature: Record the top eigenvalue of the Hessian with respect to the inputs, on 16
            test examples, after every epoch.
        microbatch_size: Examples per forward pass; auto finds the fastest; default: auto on a GPU,
            else batch_size.
        norm_batch_size: Examples that batch normalisation sees at once in training; 0 stands for
            the microbatch, and ranks for the batches of all ranks (SyncBatchNorm of torch, on GPUs
            only); default: batch_size.
        norm_statistics: Whether running statistics of batch normalisation that have not settled at
            the end of an epoch are measured again, and readings on them rejected (settled), or used
            as they are (running), as in the published code of ABSA.
        split_norm: Give the adversarial twins of conadv their own statistics and parameters of
            batch normalisation; default: true if the model has batch normalisation.
        precision: float32, or autocast in bf16 or fp16; auto is bf16 if the device computes in it,
            else float32; default: float32 for digits and fake, else auto.
        channels_last: Store images and convolutions with channels last, which is faster on most
            devices; default: false for digits, else true.
        compile: Compile the model with torch.compile, once for batches of any size.
        deterministic: Use only algorithms that repeat bit for bit on a GPU; it is an error if torch
            has none.
        device: cpu, cuda, cuda:1, ...; auto is a GPU if there is one.
        threads: Processor threads of torch; default: 1 for digits, else the choice of torch.
        seed: Seed of initialisation, data order, augmentation, attack and probe, each of which has
            its own stream.
        elastic: Train on Ray, with as many workers as suit the batch, between min_workers and
            max_workers.
        min_workers: Fewest workers of an elastic run; default: 1.
        max_workers: Most workers of an elastic run; default: 8.
        ray_address: Address of a Ray cluster; default: a local one.
        checkpoint_examples: Examples between further checkpoints within an epoch; default: none.
        checkpoint_minutes: Minutes between further checkpoints within an epoch; default: none.
        keep_checkpoints: Number of the newest checkpoints to keep.
        on_divergence: Response to divergence. stop ends the run; rollback goes back to the last
            checkpoint, undoes the last growth, and keeps the batch below it.
        max_rollbacks: Most rollbacks before the run stops.
        run_dir: Folder for records, checkpoints and plots; default: a new one below runs/.
        tensorboard: Also write TensorBoard files into the run directory (needs pip install
            'hessianflow[tensorboard]').
        log_level: Least severe messages to show while training; info has a line per epoch and per
            decision, and debug adds one per reading; default: info on a terminal, else warning.
        plots: Draw the plots at the end.
    """

    data: str = _of("data", "digits")
    data_dir: str | None = _of("data")
    train_examples: Count | None = _of("data")
    test_examples: Count | None = _of("data")
    loader_workers: Annotated[int, Range(0, 256)] = _of("data", 0)
    image_size: Annotated[int, Range(1, 4096)] | None = _of("data")
    block_length: Annotated[int, Range(1, 2**20)] | None = _of("data")
    augment: bool = _of("data", True)
    model: str | None = _of("training")
    controller: Choice = _of("training", Choice("absa"))
    adversary: Choice | None = _of("training")
    optimizer: Choice | None = _of("training")
    schedule: Choice | None = _of("training")
    batch_size: Count | None = _of("training")
    max_batch_size: Count | None = _of("training")
    epochs: Epochs | None = _of("training")
    epoch_parts: Epochs | None = _of("training")
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
    alarm_eps: Annotated[float, Range(0, 1)] | None = _of("curvature")
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
            method = getattr(self, name)
            if method is not None or name not in _MAY_BE_OPEN:
                object.__setattr__(self, name, chosen(name, method))
        for name, hint in hints().items():
            if name not in CHOSEN:
                check_setting(name, getattr(self, name), hint)
        check_together(self)
        check_effects(self, _wishes(self))


@dataclass(frozen=True)
class RunConfig(TrainConfig):
    """The resolved settings of a run: every method is chosen, with a value for each of its options.

    Its attributes are those of :class:`TrainConfig`. A setting that may still be None gives None a
    meaning of its own.
    """

    model: str = ""
    adversary: Choice = Choice("none")
    optimizer: Choice = Choice("sgd")
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
    def counted_epochs(self) -> int:
        """Return the number of epochs that controllers and records count: the parts of passes."""
        return self.epochs * (self.epoch_parts or 1)

    @property
    def is_dual_batch(self) -> bool:
        """Return whether workers train apart, with a parameter server."""
        return self.controller.name == "dual-batch"


_NEVER_FILLED = (
    *("resolution", "resolutions", "resolution_batch_sizes", "dropouts", "split_norm"),
    *("block_length", "channels_last", "epoch_parts"),
    *("min_workers", "max_workers", "ray_address"),
)
"""Settings that no preset fills unless they have an effect, so they are always explicit wishes."""
_NOT_ON_A_SERVER = (
    *("checkpoint_examples", "checkpoint_minutes"),
    *("on_divergence", "lr_rule", "curvature_budget"),
)
"""Settings that no preset fills for a run with a parameter server."""


def _wishes(config: TrainConfig) -> list[str]:
    """Return the settings whose values can only be explicit wishes."""
    wishes = list(_NEVER_FILLED)
    if config.controller.name == "dual-batch":
        usual = {setting.name: setting.default for setting in fields(TrainConfig)}
        wishes += [name for name in _NOT_ON_A_SERVER if getattr(config, name) != usual[name]]
    return wishes


def chosen(name: str, method: Any) -> Choice:
    """Return the method that is given for the setting `name`."""
    if name == "adversary" and method in ("none", {"name": "none"}, Choice("none")):
        return Choice("none")
    return choice(KINDS[name], method, name)


@cache
def hints() -> Mapping[str, Any]:
    """Return the type of every setting, with its bounds, in the order of the settings."""
    types = get_type_hints(TrainConfig, include_extras=True)
    return {setting.name: types[setting.name] for setting in fields(TrainConfig)}


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return the settings as plain values, the form of config.json."""
    return {setting.name: plain(getattr(config, setting.name)) for setting in fields(config)}


def from_dict(settings: Mapping[str, Any], source: str) -> TrainConfig:
    """Return the settings that :func:`to_dict` wrote, or that a file has in the same form.

    Raises:
        HessianFlowError: A setting is unknown, has the wrong type, or is out of bounds; the error
            names the file by `source`.
    """
    unknown = sorted(settings.keys() - hints().keys())
    if unknown:
        raise HessianFlowError(
            f"{source} has unknown settings {', '.join(unknown)}: made by another release?"
        )
    try:
        return TrainConfig(**{name: tupled(value) for name, value in settings.items()})
    except HessianFlowError as error:
        raise HessianFlowError(f"{source}: {error}") from None
