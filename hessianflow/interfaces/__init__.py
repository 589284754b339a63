"""Records and protocols that all packages of the toolkit share.

This package and the module :mod:`hessianflow.batches` are the only ones that all others may import.
Records are frozen: a measurement or a decision never changes. Protocols are small, and the trainer
knows nothing else about the methods that it runs.

`batch_size` counts examples per optimizer step over all ranks, `microbatch_size` counts examples
per forward pass on one device, and progress counts examples. A learning rate is stated at a
reference batch size.

All names can be imported from here. Those of :mod:`errors` and :mod:`control` need no torch, and
the others import it on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hessianflow.interfaces.control import (
    HESSIAN,
    NO_SIGNALS,
    UNKNOWN,
    BatchController,
    Capped,
    CurvatureReading,
    Decision,
    ForgetsReference,
    NormMode,
    Progress,
    Stateful,
)
from hessianflow.interfaces.errors import (
    AgreedError,
    HessianFlowError,
)

if TYPE_CHECKING:
    from hessianflow.interfaces.curvature import (
        Budgeted,
        CurvatureProbe,
        JudgesStatistics,
        LinearOperator,
        MeasuresModel,
        Remarks,
    )
    from hessianflow.interfaces.training import (
        Adversary,
        Batch,
        BatchTransform,
        BindsParameters,
        ChecksRows,
        EpochMeasurement,
        Exposure,
        GradientObserver,
        InputAttack,
        LossFn,
        Pending,
        RecordSink,
        ResizableBatches,
        Rewindable,
        SecondOrder,
        TakesConfig,
        TellsPlace,
        WantsClosure,
    )
    from hessianflow.interfaces.world import (
        Hits,
        JoinsRanks,
        Reducer,
        Shardable,
        StepResult,
        Wishes,
        World,
    )

__all__ = [
    "HESSIAN",
    "NO_SIGNALS",
    "UNKNOWN",
    "Adversary",
    "AgreedError",
    "Batch",
    "BatchController",
    "BatchTransform",
    "BindsParameters",
    "Budgeted",
    "Capped",
    "ChecksRows",
    "CurvatureProbe",
    "CurvatureReading",
    "Decision",
    "EpochMeasurement",
    "Exposure",
    "ForgetsReference",
    "GradientObserver",
    "HessianFlowError",
    "Hits",
    "InputAttack",
    "JoinsRanks",
    "JudgesStatistics",
    "LinearOperator",
    "LossFn",
    "MeasuresModel",
    "NormMode",
    "Pending",
    "Progress",
    "RecordSink",
    "Reducer",
    "Remarks",
    "ResizableBatches",
    "Rewindable",
    "SecondOrder",
    "Shardable",
    "Stateful",
    "StepResult",
    "TakesConfig",
    "TellsPlace",
    "WantsClosure",
    "Wishes",
    "World",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in ("curvature", "training", "world"):
            found = vars(import_module(f"{__name__}.{module}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
