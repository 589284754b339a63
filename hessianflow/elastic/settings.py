"""How an elastic run behaves."""

from dataclasses import dataclass

from hessianflow.interfaces import HessianFlowError


@dataclass(frozen=True)
class ElasticSettings:
    """How an elastic run behaves.

    Attributes:
        min_workers: the run starts with so many.
        max_workers: it never has more.
        stretch_seconds: aimed at between two boundaries. Default ours: 0.2 % of it is the round
            trip to the workers.
        snapshot_seconds: between two snapshots of the state kept in Ray's object store.
        timeout_seconds: a collective, or a stretch beyond its expected time, that takes longer
            counts as hung. Default: that of torch's NCCL groups.
        start_seconds: allowed to the first workers; a later one that takes longer is recorded as
            refused, and still taken when it comes; after one that died while starting, none is
            asked for in this time.
        num_cpus: that each worker asks Ray for.
        num_gpus: that each worker asks Ray for; above 0 the group uses NCCL.
        address: of a Ray cluster; None: a local one.
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
