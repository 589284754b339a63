"""Settings of the work after each epoch: measurements, and the weights to evaluate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hessianflow.interfaces import EpochMeasurement, HessianFlowError
from hessianflow.training.arguments import as_list, check_functions, check_parts


@dataclass(frozen=True)
class AfterEpoch:
    """Settings of the work after every epoch besides the evaluation on the evaluation data.

    Attributes:
        curvature: whether the probe measures then; if not, only when the controller needs it.
        before_evaluation: called before the model is evaluated and saved as the best; it may set
            buffers, or replace the weights by an average.
        after_evaluation: called afterwards, even after an error, to restore the weights.
        measurements: made and recorded, such as
            :class:`~hessianflow.adversarial.RobustnessWatch`.

    Raises:
        HessianFlowError: a setting is not what it must be.
    """

    curvature: bool = True
    before_evaluation: Callable[[], None] | None = None
    after_evaluation: Callable[[], None] | None = None
    measurements: Sequence[EpochMeasurement] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.curvature, bool):
            raise HessianFlowError(
                "AfterEpoch.curvature must be True (after every epoch) or False (when the"
                f" controller needs it), got {self.curvature!r}"
            )
        check_functions(before_evaluation=self.before_evaluation)
        check_functions(after_evaluation=self.after_evaluation)
        object.__setattr__(self, "measurements", as_list("measurements", self.measurements))
        check_parts(measurements=self.measurements)
