"""Train on a number of workers that follows the batch: the trainer as a job of
`hessianflow.distributed.ElasticRun`."""

from hessianflow.elastic.build import build_elastic
from hessianflow.elastic.job import TrainerJob
from hessianflow.elastic.trainer import ElasticTrainer

__all__ = ["ElasticTrainer", "TrainerJob", "build_elastic"]
