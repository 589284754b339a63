"""Settings of the forward and backward passes, which compute the gradient of a step."""

from dataclasses import dataclass
from typing import Literal, get_args

from hessianflow.checks import check_choice, check_count, check_limit
from hessianflow.normalisation.settle import NormStatistics

Precision = Literal["float32", "bf16", "fp16"]


@dataclass(frozen=True)
class Passes:
    """Settings of the forward and backward passes of a step.

    None of them changes the optimization batch: its gradient is that of the mean loss over the
    whole batch, however it is cut.

    Attributes:
        microbatch_size: examples per forward pass on the device; halved for good when memory runs
            out. "auto" looks for the fastest that fits. None: "auto" on a GPU, elsewhere the
            reference batch size.
        norm_batch_size: examples that batch normalisation sees at once in training ("ghost" batch
            normalisation). None: the reference batch size, as the published runs had in effect. 0:
            the whole microbatch.
        norm_statistics: "settled": where the running statistics of batch normalisation have not
            settled at the end of an epoch, they are measured again on the batch trained last,
            before any other measurement (:mod:`~hessianflow.normalisation.settle`). "running": they
            are left as training made them; with it the probe's `check_statistics=False` gives the
            signal of ABSA's published code.
        precision: "float32", or autocast in "bf16" or "fp16" (the latter with loss scaling).
        max_grad_norm: the gradient of each step is clipped to this norm; None: it is not clipped.

    Raises:
        HessianFlowError: a setting is not what it must be.
    """

    microbatch_size: int | Literal["auto"] | None = None
    norm_batch_size: int | None = None
    norm_statistics: NormStatistics = "settled"
    precision: Precision = "float32"
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        if self.microbatch_size != "auto":
            either = 'the default, or "auto"'
            check_count("Passes.microbatch_size", self.microbatch_size, none=either)
        default = "the reference batch size"
        check_count("Passes.norm_batch_size", self.norm_batch_size, 0, none=default)
        check_choice("Passes.norm_statistics", self.norm_statistics, get_args(NormStatistics))
        check_choice("Passes.precision", self.precision, get_args(Precision))
        check_limit("Passes.max_grad_norm", self.max_grad_norm, "no clipping")

    def norm_group(self, reference_batch_size: int) -> int | None:
        """Return the examples that batch normalisation sees at once; None: the microbatch."""
        if self.norm_batch_size is None:
            return reference_batch_size
        return self.norm_batch_size or None
