"""Elastic runs on Ray, whose number of workers follows the batch size while training continues.

:class:`ElasticRun` runs any job in this way. :class:`ElasticTrainer` runs the trainer as such a
job, with records and checkpoints.
"""

from hessianflow.elastic.build import build_elastic
from hessianflow.elastic.job import TrainerJob
from hessianflow.elastic.member import ElasticJob, JobReport
from hessianflow.elastic.policy import Sample, workers_for
from hessianflow.elastic.run import ElasticEvent, ElasticRun
from hessianflow.elastic.settings import ElasticSettings
from hessianflow.elastic.trainer import ElasticTrainer

__all__ = [
    "ElasticEvent",
    "ElasticJob",
    "ElasticRun",
    "ElasticSettings",
    "ElasticTrainer",
    "JobReport",
    "Sample",
    "TrainerJob",
    "build_elastic",
    "workers_for",
]
