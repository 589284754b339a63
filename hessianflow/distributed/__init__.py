"""From one process to a cluster: process groups, synchronised gradients and curvature, elastic
runs, dry runs."""

from hessianflow.distributed.curvature import AllReducedOperator, shard, sharded
from hessianflow.distributed.elastic import ElasticEvent, ElasticRun
from hessianflow.distributed.elastic_member import ElasticJob, JobReport
from hessianflow.distributed.elastic_policy import Sample, workers_for
from hessianflow.distributed.elastic_settings import ElasticSettings
from hessianflow.distributed.fingerprint import check_same_program, code_fingerprint
from hessianflow.distributed.launch import run_local
from hessianflow.distributed.parameter_server import ParameterServer
from hessianflow.distributed.performance import (
    AllReduceTime,
    PerformanceModel,
    Phase,
    Prediction,
    StepTime,
    fit_all_reduce,
    fit_step_time,
    measure_all_reduce,
    measure_steps,
    predict,
)
from hessianflow.distributed.process_group import (
    Generation,
    ProcessGroupReducer,
    from_environment,
    local_device,
    process_group,
)
from hessianflow.distributed.ray_server import train_on_ray
from hessianflow.distributed.reducers import GroupReducer, LocalReducer
from hessianflow.distributed.simulated import run_simulated
from hessianflow.distributed.simulated_server import Commit, simulate
from hessianflow.distributed.state import average_buffers, broadcast_module, broadcast_state
from hessianflow.distributed.synchronize import GradientSynchronizer
from hessianflow.distributed.world import GroupWorld, launched_world

__all__ = [
    "AllReduceTime",
    "AllReducedOperator",
    "Commit",
    "ElasticEvent",
    "ElasticJob",
    "ElasticRun",
    "ElasticSettings",
    "Generation",
    "GradientSynchronizer",
    "GroupReducer",
    "GroupWorld",
    "JobReport",
    "LocalReducer",
    "ParameterServer",
    "PerformanceModel",
    "Phase",
    "Prediction",
    "ProcessGroupReducer",
    "Sample",
    "StepTime",
    "average_buffers",
    "broadcast_module",
    "broadcast_state",
    "check_same_program",
    "code_fingerprint",
    "fit_all_reduce",
    "fit_step_time",
    "from_environment",
    "launched_world",
    "local_device",
    "measure_all_reduce",
    "measure_steps",
    "predict",
    "process_group",
    "run_local",
    "run_simulated",
    "shard",
    "sharded",
    "simulate",
    "train_on_ray",
    "workers_for",
]
