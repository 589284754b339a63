"""The facts about a run that its methods may ask for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunFacts:
    """The figures and choices of a run that the options of its methods may depend on.

    Attributes:
        epochs: Passes over the training data; for a controller, the epochs that it counts.
        batch_size: Examples per optimizer step at the start.
        max_batch_size: Cap on growing batches.
        optimizer: Name of the optimizer; if one wraps another (SAM), the name of the inner one.
        momentum: Momentum of that optimizer; None if it has none.
        milestones: Epochs at which the usual schedule of the data set lowers the rate, scaled to a
            run of `epochs`.
        schedule: Name of the learning-rate schedule.
        warmup_epochs: Epochs over which that schedule warms up.
        norm_mode: Statistics of batch normalisation in curvature measurements, "eval" or "batch".
        lr_rule: Rule by which the rate follows the batch; None: the controller's own.
        adversary: Name of the adversary; "none" without one.
    """

    epochs: int
    batch_size: int
    max_batch_size: int
    optimizer: str = "sgd"
    momentum: float | None = None
    milestones: tuple[int, ...] = ()
    schedule: str = "constant"
    warmup_epochs: float = 0.0
    norm_mode: str = "eval"
    lr_rule: str | None = None
    adversary: str = "none"
