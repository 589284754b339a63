"""Elastic runs on Ray: workers come and go with the batch, and the training goes on.

:class:`ElasticRun` runs any job on a number of workers that follows its batch;
:class:`ElasticTrainer` is the trainer as such a job, with records and checkpoints.
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
