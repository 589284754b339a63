"""Workers that run other code or end while they start, on a stand-in for Ray: every call is
answered at once."""

from types import SimpleNamespace

import pytest
from sockets import listening

from hessianflow.elastic.cluster import Cluster
from hessianflow.elastic.settings import ElasticSettings
from hessianflow.interfaces import HessianFlowError


class TaskError(Exception):
    """What Ray raises where the code of an actor does."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a whole traceback\nof many lines")
        self.cause = cause


class LostError(Exception):
    """What Ray raises where an object has gone with its node."""


class InstantRay:
    """Actors that answer with the hash of the code that they are said to run, or raise."""

    exceptions = SimpleNamespace(
        RayActorError=ConnectionError, RayTaskError=TaskError, ObjectLostError=LostError
    )

    def __init__(self, *programs: str | Exception) -> None:
        self.programs, self.killed = list(programs), []

    def remote(self, **_):
        return lambda cls: SimpleNamespace(remote=lambda *_: self.actor(self.programs.pop(0)))

    def actor(self, program):
        return SimpleNamespace(program=SimpleNamespace(remote=lambda: program))

    def cluster_resources(self):
        return {"CPU": 8.0}

    def wait(self, refs, num_returns=1, timeout=None):
        return list(refs), []

    def get(self, ref):
        if isinstance(ref, Exception):
            raise ref
        return ref

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


def test_first_workers_that_end_while_they_start_are_asked_for_again():
    ray = InstantRay(
        "aaaa", ConnectionError("killed\nby someone"), ConnectionError("killed"), "aaaa"
    )
    cluster = Cluster(ray, lambda: None, ElasticSettings(2, 2))
    cluster.request(2)
    assert cluster.await_all(1.0) == [
        "died while it started: killed",
        "died while it started: killed",
    ]
    assert len(cluster.members) == 2
    assert not cluster.pending
    assert not ray.programs


def test_first_workers_that_always_end_are_given_up():
    cluster = Cluster(
        InstantRay(*[ConnectionError("killed")] * 6), lambda: None, ElasticSettings(1, 1)
    )
    cluster.request(1)
    with pytest.raises(
        ValueError,
        match="6 new workers in a row were of no use, the last died while it started: killed",
    ):
        cluster.await_all(1.0)


def test_a_newcomer_that_ends_between_two_looks_is_not_admitted():
    """Ready when it was looked at, dead when it was to become a member."""
    cluster = Cluster(
        InstantRay("aaaa", ConnectionError("killed"), "bbbb"), lambda: None, ElasticSettings(1, 3)
    )
    cluster.request(1)
    cluster.await_all(1.0)
    cluster.request(2)
    assert cluster.arrived()
    assert cluster.admit() == 0
    assert cluster.drop_failed() == [
        "died while it started: killed",
        "runs other code (bbbb) than the others (aaaa)",
    ]
    assert len(cluster.members) == 1
    assert not cluster.pending


@pytest.mark.parametrize(
    "cause", [HessianFlowError("no data under x: get it"), KeyError("a bug of the user's")]
)
def test_an_error_of_a_job_that_is_built(cause):
    """The first to build it ends the run, with its own words where they say what to do; a later one
    is refused."""
    cluster = Cluster(InstantRay(TaskError(cause)), lambda: None, ElasticSettings(1, 2))
    cluster.request(1)
    with pytest.raises(type(cause) if isinstance(cause, HessianFlowError) else TaskError):
        cluster.await_all(1.0)
    cluster = Cluster(InstantRay("aaaa", TaskError(cause)), lambda: None, ElasticSettings(1, 2))
    cluster.request(1)
    cluster.await_all(1.0)
    cluster.request(1)
    assert cluster.drop_failed() == [f"could not build its job: {cause}"]
    assert len(cluster.members) == 1


def test_a_snapshot_that_is_lost_says_so():
    cluster = Cluster(InstantRay(), lambda: None, ElasticSettings())
    cluster._snapshot = LostError("OwnerDied\nand more")
    with pytest.raises(
        HessianFlowError, match=r"snapshot is lost .* \(OwnerDied\): resume from the run directory"
    ):
        cluster.snapshot()


def test_the_store_of_a_local_run_is_out_of_reach_of_other_machines():
    cluster = Cluster(InstantRay(), lambda: None, ElasticSettings())
    assert {address for address, port in listening() if port == cluster._store.port} == {
        "127.0.0.1"
    }


def test_first_workers_with_different_code_are_an_error():
    cluster = Cluster(InstantRay("aaaa", "bbbb"), lambda: None, ElasticSettings(2, 2))
    cluster.request(2)
    with pytest.raises(
        ValueError, match="all workers must run the same code: one has aaaa, another bbbb"
    ):
        cluster.await_all(1.0)


def test_gpus_that_are_not_there():
    cluster = Cluster(InstantRay(), lambda: None, ElasticSettings(1, 2, num_gpus=1.0))
    with pytest.raises(
        ValueError, match="1 workers of 1 GPUs need more than the 0 GPUs of this machine"
    ):
        cluster.request(1)
