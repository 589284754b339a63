"""Training of one model by several processes, called ranks: process groups, sums of gradients,
curvature over ranks, and simulated ranks.
"""

from hessianflow.distributed.curvature import AllReducedOperator, shard, sharded
from hessianflow.distributed.launch import run_local, run_simulated
from hessianflow.distributed.process_group import (
    Generation,
    ProcessGroupReducer,
    from_environment,
    local_device,
    process_group,
)
from hessianflow.distributed.state import average_buffers, broadcast_module, broadcast_state
from hessianflow.distributed.synchronize import GradientSynchronizer
from hessianflow.distributed.world import (
    GroupWorld,
    check_same_program,
    code_fingerprint,
    current_world,
    launched_world,
)
from hessianflow.interfaces.world import GroupReducer, LocalReducer

__all__ = [
    "AllReducedOperator",
    "Generation",
    "GradientSynchronizer",
    "GroupReducer",
    "GroupWorld",
    "LocalReducer",
    "ProcessGroupReducer",
    "average_buffers",
    "broadcast_module",
    "broadcast_state",
    "check_same_program",
    "code_fingerprint",
    "current_world",
    "from_environment",
    "launched_world",
    "local_device",
    "process_group",
    "run_local",
    "run_simulated",
    "shard",
    "sharded",
]
