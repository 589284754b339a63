"""From one process to a cluster: process groups, synchronised gradients and curvature, elastic runs, dry runs."""

from hessianflow.distributed.fingerprint import check_same_program, code_fingerprint
from hessianflow.distributed.launch import run_local
from hessianflow.distributed.process_group import (
    Generation,
    ProcessGroupReducer,
    from_environment,
    local_device,
    process_group,
)
from hessianflow.distributed.reducers import GroupReducer, LocalReducer
from hessianflow.distributed.state import average_buffers, broadcast_module, broadcast_state

__all__ = [
    "Generation",
    "GroupReducer",
    "LocalReducer",
    "ProcessGroupReducer",
    "average_buffers",
    "broadcast_module",
    "broadcast_state",
    "check_same_program",
    "code_fingerprint",
    "from_environment",
    "local_device",
    "process_group",
    "run_local",
]
