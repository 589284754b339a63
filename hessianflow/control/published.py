"""The published settings of dual-batch learning, as numbers to plan with.

Lu, Hong, Liu, Wu, "Hybrid dual-batch and cyclic progressive learning for efficient distributed
training", arXiv:2509.26092, and its official code have ResNet-18, four workers, journal rounding,
and the times of a GTX 1080 (CIFAR-100) and of an RTX 3090 with mixed precision (ImageNet). The
COMPSAC 2022 paper has CIFAR-100 at one resolution, the times of a GTX 1080, and rounding down.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hessianflow.control.dual_batch import DualBatchPlan, Rounding, dual_batch_plan
from hessianflow.control.resolution import Level, Schedule, Stage, resolution_stages
from hessianflow.control.time_model import TimeModel


@dataclass(frozen=True)
class Published:
    """One published setting of dual-batch learning.

    Attributes:
        data: Name of the data set in this package.
        examples: Examples per epoch.
        levels: Resolution, largest batch and dropout, from low to high.
        times: Seconds per step at each level.
        phase_ends: Epochs at which the rate is multiplied by `lr_decay`; the last one ends the run.
        lr: Learning rate at the start, at every batch size.
        lr_decay: Factor of the learning rate at the end of a phase.
        rounding: Rounding of the plans.
    """

    data: str
    examples: int
    levels: tuple[Level, ...]
    times: tuple[TimeModel, ...]
    phase_ends: tuple[int, ...]
    lr: float
    lr_decay: float
    rounding: Rounding = "nearest"

    def plan(
        self, level: int, num_workers: int, num_small: int, extra_time_ratio: float
    ) -> DualBatchPlan:
        """Return the plan at a level, counted from 0 for the lowest resolution."""
        return dual_batch_plan(
            num_workers,
            num_small,
            self.examples,
            self.levels[level].batch_size,
            self.times[level].slope,
            self.times[level].intercept,
            extra_time_ratio,
            rounding=self.rounding,
        )

    def stages(self, schedule: Schedule | None) -> tuple[Stage, ...]:
        """Return the stages of a run; None stands for the highest resolution throughout."""
        if schedule is None:
            return resolution_stages(self.phase_ends, self.levels[-1:], "uniform")
        return resolution_stages(self.phase_ends, self.levels, schedule)


_CIFAR_LEVELS = (Level(24, 600, 0.1), Level(32, 560, 0.2))
_CIFAR_TIMES = (TimeModel(3.5268e-4, 0.0147888), TimeModel(5.05636e-4, 0.0155621))
_IMAGENET_LEVELS = (Level(160, 2330, 0.1), Level(224, 1110, 0.2), Level(288, 740, 0.3))
_IMAGENET_TIMES = (
    TimeModel(3.01354e-4, 0.0120368),
    TimeModel(5.68377e-4, 0.0170509),
    TimeModel(9.38717e-4, 0.0166600),
)
_COMPSAC_TIMES = (TimeModel(0.00056607, 0.014041204118),)

PUBLISHED: Mapping[str, Published] = {
    "cifar100": Published(
        "cifar100", 50_000, _CIFAR_LEVELS, _CIFAR_TIMES, (80, 120, 140), 0.2, 0.1
    ),
    "imagenet": Published(
        "imagenet", 1_281_167, _IMAGENET_LEVELS, _IMAGENET_TIMES, (60, 90, 105), 0.2, 0.1
    ),
    "compsac": Published(
        "cifar100", 50_000, (Level(32, 500),), _COMPSAC_TIMES, (80, 120, 140), 0.1, 0.2, "down"
    ),
}
