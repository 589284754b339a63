"""What a method may ask of the run that it is chosen for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunFacts:
    """The figures and choices of a run that the options of its methods may depend on.

    Attributes:
        epochs: passes over the training data.
        batch_size: examples per optimizer step at the start.
        max_batch_size: cap for growing batches.
        optimizer: name of the optimizer; of a wrapping one (SAM) that of the optimizer inside.
        momentum: momentum of that optimizer; None where it has none.
        milestones: epochs at which the data set's usual schedule lowers the rate, at their places
            in a run of `epochs`.
        schedule: name of the learning-rate schedule.
        warmup_epochs: epochs over which that schedule warms up.
        norm_mode: statistics of batch normalisation in curvature measurements, "eval" or "batch".
        lr_rule: rule by which the rate follows the batch; None: the controller's own.
        adversary: name of the adversary; "none" where there is none.
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
