"""The settings of an elastic run."""

from dataclasses import dataclass

from hessianflow.interfaces import HessianFlowError


@dataclass(frozen=True)
class ElasticSettings:
    """The bounds, times and resources of an elastic run.

    Attributes:
        min_workers: Number of workers at the start, and the smallest later.
        max_workers: Largest number of workers.
        stretch_seconds: Intended time between two boundaries. This default is our choice: the round
            trip to the workers takes 0.2 % of it.
        snapshot_seconds: Time between two snapshots of the state in Ray's object store.
        timeout_seconds: Time after which a collective, or a stretch beyond its expected time,
            counts as hung. The default is that of torch's NCCL groups.
        start_seconds: Time in which the first workers must start. A later worker that takes longer
            is recorded as refused, and still admitted when it arrives. After one that died while it
            started, none is requested for this time.
        num_cpus, num_gpus: CPUs and GPUs that each worker requests; with GPUs the group uses NCCL.
        address: Address of a Ray cluster; None for a local one.
    """

    min_workers: int = 1
    max_workers: int = 1
    stretch_seconds: float = 1.0
    snapshot_seconds: float = 60.0
    timeout_seconds: float = 600.0
    start_seconds: float = 120.0
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    address: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.min_workers <= self.max_workers:
            raise HessianFlowError(
                f"min_workers must lie between 1 and max_workers, got {self.min_workers} and"
                f" {self.max_workers}"
            )
