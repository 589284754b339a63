"""Settings of methods that need several: parts of :class:`hessianflow.config.TrainConfig`, with
their own checks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hessianflow.bounds import option
from hessianflow.interfaces import HessianFlowError

ResolutionName = Literal["cyclic", "once", "uniform"]
ServerName = Literal["simulated", "ray"]
SynchronyName = Literal["asp", "bsp", "ssp"]

AttackName = Literal["fgsm", "pgd"]
CombineName = Literal["sum", "average"]
RunnerName = Literal["interleaved", "process", "stream"]

NOT_ON_A_SERVER = (
    "checkpoint_examples",
    "checkpoint_minutes",
    "on_divergence",
    "lr_rule",
    "curvature_budget",
)
"""Settings that data sets and optimizers have presets for, but runs with a parameter server do
not."""
_NOT_ELASTIC = (
    ("adversary", "conadv"),
    ("controller", "dual-batch"),
    ("on_divergence", "rollback"),
)
"""Settings of runs that keep batches of their own, have workers of their own, or go back to
files."""

SIDES: Mapping[str, int] = {
    "digits": 8,
    "fake": 16,
    "cifar10": 32,
    "cifar100": 32,
    "svhn": 32,
    "tiny-imagenet": 64,
}
"""Pixels a side of the images of each data set; those of image files are cut to any size."""
FILE_SIDE = 224
"""Side that image files are cut to, unless resolutions say otherwise."""


@dataclass(frozen=True)
class ResolutionSettings:
    """The resolution over training time.

    Attributes:
        resolution: lower resolutions first. cyclic: from low to high within every stretch of
            constant learning rate; once: one resolution a stretch; uniform: in equal parts,
            whatever the rate; default: full resolution.
        resolutions: pixels a side, increasing, e.g. "[24, 32]"; the last is that of the data;
            default: three quarters of it, then all.
        resolution_batch_sizes: examples per step that go with each resolution, e.g. "[600, 560]":
            the controller's size is taken times the size here over the last one; default: the same
            at every resolution.
        dropouts: dropout before the last linear layer at each resolution, e.g. "[0.1, 0.2]"; conadv
            takes it with staleness 0 only; default: none.
    """

    resolution: ResolutionName | None = None
    resolutions: tuple[int, ...] | None = None
    resolution_batch_sizes: tuple[int, ...] | None = None
    dropouts: tuple[float, ...] | None = None

    def check_resolution(self) -> None:
        """Refuse resolutions that do not increase, or lists of different lengths.

        Raises:
            HessianFlowError: naming the option.
        """
        for name in ("resolution_batch_sizes", "dropouts"):
            values = getattr(self, name)
            if (
                values is not None
                and self.resolutions is not None
                and len(values) != len(self.resolutions)
            ):
                raise HessianFlowError(
                    f"{option(name)} must hold one value for each of the {len(self.resolutions)}"
                    f" resolutions, got {len(values)}"
                )
        sizes = self.resolutions
        if sizes is not None and (not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes))):
            raise HessianFlowError(
                f"--resolutions must be one or more increasing sizes in pixels, got {list(sizes)}"
            )
        if (
            self.resolution_batch_sizes is not None
            and min(self.resolution_batch_sizes, default=0) < 1
        ):
            raise HessianFlowError(
                "--resolution-batch-sizes must be 1 or more, got"
                f" {list(self.resolution_batch_sizes)}"
            )
        if self.dropouts is not None and not all(0 <= value < 1 for value in self.dropouts):
            raise HessianFlowError(f"--dropouts must lie in [0, 1), got {list(self.dropouts)}")

    def resolutions_of(self, data: str, image_size: int | None) -> tuple[int, ...]:
        """Return the resolutions given, or the default ones for the images of `data`.

        Args:
            data: name of the data set.
            image_size: side that image files are cut to; None: not known.

        Raises:
            HessianFlowError: the images do not have the highest of them.
        """
        side = SIDES.get(data, image_size)
        if self.resolutions is None:
            full = side or FILE_SIDE
            return (full * 3 // 4, full)
        if side is not None and self.resolutions[-1] != side:
            raise HessianFlowError(
                f"--resolutions must end with {side}, the pixels a side of {data}, got"
                f" {list(self.resolutions)}"
            )
        return self.resolutions


@dataclass(frozen=True)
class DualBatchSettings:
    """Dual-batch learning on a parameter server.

    Attributes:
        workers: of dual-batch; default: 4.
        small_workers: how many of them use the small batch; default: all but one.
        extra_time: what an epoch may take, relative to one with large batches only; default: 1.05,
            as published.
        slope: seconds an example, one value or one for each resolution; default: measured at the
            start.
        intercept: seconds a step; as slope.
        min_small_batch_size: floor of the small batch; default: 1.
        server: simulated: in one process, on a clock that follows slope and intercept; ray: one
            process a worker; default: simulated.
        synchrony: of the server. asp: every push is mixed at once; bsp: rounds; ssp: asp until a
            worker is too far ahead; default: asp, as published.
        ray_address: of a Ray cluster, also for elastic; default: a local one.
    """

    workers: int | None = None
    small_workers: int | None = None
    extra_time: float | None = None
    slope: float | tuple[float, ...] | None = None
    intercept: float | tuple[float, ...] | None = None
    min_small_batch_size: int | None = None
    server: ServerName | None = None
    synchrony: SynchronyName | None = None
    ray_address: str | None = None

    def check_dual_batch(self) -> None:
        """Refuse half a line of step times.

        Raises:
            HessianFlowError: naming the options.
        """
        if (self.slope is None) != (self.intercept is None):
            raise HessianFlowError(
                "--slope and --intercept make a line together: give both or neither"
            )

    def dual_batch_defaults(self) -> dict[str, Any]:
        """Return what is left open, filled; the cap for growing batches plays no role and is raised
        to the batch size."""
        workers = self.workers or 4
        plan = {
            "workers": workers,
            "small_workers": workers - 1,
            "extra_time": 1.05,
            "min_small_batch_size": 1,
        }
        return {**plan, "max_batch_size": 1, "server": "simulated", "synchrony": "asp"}

    def check_plan(self) -> None:
        """Refuse more small workers than workers, and an extra time that leaves the small ones no
        example.

        Raises:
            HessianFlowError: naming the option and the bound.
        """
        workers, small, extra = self.workers or 1, self.small_workers or 0, self.extra_time or 1.0
        large = workers - small
        if large < 0:
            raise HessianFlowError(f"--small-workers {small} is more than --workers {workers}")
        if small and large and extra >= workers / large:
            raise HessianFlowError(
                f"--extra-time must be less than {workers / large:.4g} (workers / large workers)"
                f" with {large} large of {workers} workers, got {extra:g}: they would take all"
                " examples"
            )


@dataclass(frozen=True)
class TwinSettings:
    """Concurrent adversarial learning: every clean example and its adversarial twin.

    Attributes:
        staleness: conadv attacks so many steps before use; 0: at the step itself; default: 1.
        conadv_attack: how conadv makes its twins; default: fgsm.
        attack_runner: where conadv attacks; in a second process (CPU), on a second stream (GPU), or
            in turn with training; default: stream on a GPU, else interleaved.
        combine: conadv trains on the sum of the mean losses of clean examples and twins, or on
            their average; default: sum, as published.
        split_norm: whether conadv gives the twins batch-normalisation statistics and parameters of
            their own; default: where the model has batch normalisation.
    """

    staleness: int | None = None
    conadv_attack: AttackName | None = None
    attack_runner: RunnerName | None = None
    combine: CombineName | None = None
    split_norm: bool | None = None

    def check_twins(self, *, wanted: bool, dropouts: bool) -> None:
        """Refuse a staleness above 0 with dropouts.

        Raises:
            HessianFlowError: naming the option.
        """
        if wanted and dropouts and self.staleness != 0:
            steps = 1 if self.staleness is None else self.staleness
            raise HessianFlowError(
                "--dropouts needs --staleness 0: dropout is set when a batch is drawn, with"
                f" staleness {steps} early"
            )


@dataclass(frozen=True)
class WorkerSettings:
    """How many processes train.

    Attributes:
        elastic: train on Ray, with as many workers as the batch deserves, between min_workers and
            max_workers.
        min_workers: of an elastic run; default: 1.
        max_workers: of an elastic run; default: 8.
    """

    elastic: bool = False
    min_workers: int | None = None
    max_workers: int | None = None

    def check_workers(self, **others: str) -> None:
        """Refuse bounds that contradict each other, and what an elastic run cannot do.

        Args:
            others: further settings, of which some do not go with `elastic`.

        Raises:
            HessianFlowError: naming the option.
        """
        low, high = self.min_workers or 1, self.max_workers or 8
        if low > high:
            raise HessianFlowError(f"--max-workers {high} is below --min-workers {low}: raise it")
        for name, value in others.items():
            if self.elastic and (name, value) in _NOT_ELASTIC:
                raise HessianFlowError(
                    f"--elastic does not go with {option(name)} {value}: leave one out"
                )


def as_tuple(value: float | tuple[float, ...]) -> tuple[float, ...]:
    """One value, or several, as a tuple."""
    return value if isinstance(value, tuple) else (value,)
