"""Workers that run other code, on a stand-in for Ray: every call is answered at once."""

from types import SimpleNamespace

import pytest

from hessianflow.distributed.elastic_cluster import Cluster
from hessianflow.distributed.elastic_settings import ElasticSettings


class InstantRay:
    """Actors that answer with the hash of the code that they are said to run."""

    exceptions = SimpleNamespace(RayActorError=ConnectionError, RayTaskError=ConnectionError)

    def __init__(self, *programs: str) -> None:
        self.programs, self.killed = list(programs), []

    def remote(self, **_):
        return lambda cls: SimpleNamespace(remote=lambda *_: self.actor(self.programs.pop(0)))

    def actor(self, program):
        return SimpleNamespace(program=SimpleNamespace(remote=lambda: program))

    def cluster_resources(self):
        return {"CPU": 8.0}

    def wait(self, refs, num_returns=1, timeout=None):
        return list(refs), []

    def get(self, refs):
        return refs

    def kill(self, actor):
        self.killed.append(actor)


def test_a_newcomer_with_other_code_is_refused():
    ray = InstantRay("aaaa", "aaaa", "bbbb", "aaaa")
    cluster = Cluster(ray, lambda: None, ElasticSettings(2, 4))
    cluster.request(2)
    cluster.await_all(1.0)
    assert len(cluster.members) == 2
    cluster.request(2)
    assert cluster.drop_failed() == ["runs other code (bbbb) than the others (aaaa)"]
    assert len(ray.killed) == 1
    assert cluster.admit() == 1
    assert len(cluster.members) == 3


def test_first_workers_with_different_code_are_an_error():
    cluster = Cluster(InstantRay("aaaa", "bbbb"), lambda: None, ElasticSettings(2, 2))
    cluster.request(2)
    with pytest.raises(ValueError, match="all workers must run the same code: one has aaaa, another bbbb"):
        cluster.await_all(1.0)


def test_gpus_that_are_not_there():
    cluster = Cluster(InstantRay(), lambda: None, ElasticSettings(1, 2, num_gpus=1.0))
    with pytest.raises(ValueError, match="1 workers of 1 GPUs need more than the 0 GPUs of this machine"):
        cluster.request(1)
