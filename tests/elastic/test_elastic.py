from functools import partial

import pytest
import torch
from jobs import (
    BrokenJob,
    DoomedJob,
    DyingNewcomer,
    DyingStarter,
    FailingJob,
    PlainJob,
    RefusingJob,
    UnevenJob,
    WritingJob,
)
from ranks import LOCAL

from hessianflow.elastic import cluster as elastic_cluster
from hessianflow.elastic import pool as elastic_pool
from hessianflow.elastic.run import ElasticRun
from hessianflow.elastic.settings import ElasticSettings
from hessianflow.interfaces import HessianFlowError

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
TOTAL = 24
STEPWISE = {"stretch_seconds": 0.0, "start_seconds": 600.0}
"""A boundary after every update, and patience with a busy machine."""


def alone(folder) -> tuple[dict, int]:
    """The job without Ray, group or resizing: what every elastic run of it must end with."""
    job = PlainJob(str(folder), TOTAL)
    job.join(LOCAL)
    report = job.run_until(TOTAL)
    return job.model.state_dict(), report.examples


def check_result(folder, report) -> None:
    weights, examples = alone(folder)
    assert (report.updates, report.examples, report.done) == (TOTAL, examples, True)
    found = torch.load(folder / "weights.pt", weights_only=True)
    for name, expected in weights.items():
        assert torch.allclose(found[name], expected, rtol=0, atol=1e-10), name


def changes(run) -> list[str]:
    """Kinds of events; a busy machine may make any rank a slow one."""
    return [event.kind for event in run.events if event.kind != "slow"]


def settle(ray, run) -> None:
    """Wait until every newcomer has built its job, or died."""
    refs = [newcomer.ready for newcomer in run._cluster.pending]
    if refs:
        ray.wait(refs, num_returns=len(refs), timeout=600)


@pytest.mark.slow
def test_the_world_follows_the_batch(ray, tmp_path):
    """One worker for batches of 8, two for 16, one again at the end: the weights are those of one
    process.

    The newcomer is asked for after 12 updates, when the batch has doubled, and waited for after 16
    only.
    """

    def policy(report, samples):
        if report.updates >= 16:
            settle(ray, run)
        return 1 if report.updates >= 20 else report.batch_size // report.microbatch_size

    seen = []
    settings = ElasticSettings(max_workers=2, **STEPWISE)
    run = ElasticRun(partial(WritingJob, str(tmp_path), TOTAL), policy, settings, seen.append)
    check_result(tmp_path, run.run())
    assert seen == run.events
    assert changes(run) == ["started", "requested", "joined", "left", "finished"]
    _, requested, joined, left, finished = [event for event in run.events if event.kind != "slow"]
    assert [event.workers for event in (requested, joined, left, finished)] == [1, 2, 1, 1]
    assert requested.updates == 12
    assert 12 < joined.updates <= 16, "the others train while a newcomer starts"
    assert left.updates == 20
    assert min(joined.pause, left.pause) > 0
    assert {sample.workers for sample in run.samples} == {1, 2}
    assert all(sample.examples_per_second > 0 for sample in run.samples)


@pytest.mark.slow
def test_members_that_die_or_hang_are_replaced(ray, tmp_path, monkeypatch):
    """Rank 0 is killed within update 6, rank 1 hangs in update 12; no example is lost or counted
    twice.

    Rank 1 never waits for others, which makes it a slow one.
    """
    monkeypatch.setattr(elastic_cluster, "GRACE_SECONDS", 2.0)

    def policy(report, samples):
        settle(ray, run)
        return 2

    settings = ElasticSettings(min_workers=2, max_workers=2, timeout_seconds=8.0, **STEPWISE)
    faults = {6: (0, "dies"), 12: (1, "hangs")}
    run = ElasticRun(partial(UnevenJob, str(tmp_path), TOTAL, faults), policy, settings)
    check_result(tmp_path, run.run())
    assert {"started", "died", "hung", "restored", "requested", "joined", "finished"} == set(
        changes(run)
    )
    died = next(event for event in run.events if event.kind == "died")
    assert died.updates == 6
    assert "rank 0" in died.message
    slow = next(event for event in run.events if event.kind == "slow")
    assert slow.message.startswith("rank 1 computed")


@pytest.mark.slow
def test_a_newcomer_that_dies_is_done_without_and_the_only_member_replaced(ray, tmp_path):
    """Snapshots are taken at every boundary: the run goes on from the one before update 12. Records
    come once each."""
    rows, snapshots = [], []

    def on_rows(start, made):
        del rows[start:]
        rows.extend(made)

    def policy(report, samples):
        settle(ray, run)
        return 2

    settings = ElasticSettings(max_workers=2, snapshot_seconds=0.0, **STEPWISE)
    run = ElasticRun(
        partial(DyingNewcomer, str(tmp_path), TOTAL, {12: (0, "dies")}), policy, settings
    )
    run.on_rows, run.on_snapshot = on_rows, snapshots.append
    check_result(tmp_path, run.run())
    told = [event for event in run.events if event.kind not in ("slow", "snapshot")]
    assert [e.kind for e in told] == [
        "started",
        "requested",
        "refused",
        "died",
        "restored",
        "finished",
    ]
    _, _, refused, died, restored, _ = told
    assert [row["number"] for row in rows] == list(range(TOTAL))
    assert snapshots[-1]["done"] == [TOTAL, told[-1].examples]
    assert run.description == {"updates": TOTAL}
    assert "died while it started" in refused.message
    assert died.updates == restored.updates == 12


@pytest.mark.slow
def test_first_workers_that_die_while_they_start_are_replaced(ray, tmp_path):
    """The first process is killed while it builds its job, the next while it joins, one more before
    it is described."""
    run = ElasticRun(
        partial(DyingStarter, str(tmp_path), TOTAL), lambda r, s: 1, ElasticSettings(**STEPWISE)
    )
    check_result(tmp_path, run.run())
    assert [mark for mark in ("building", "joining", "describing") if (tmp_path / mark).exists()]
    assert changes(run) == ["started", "refused", "refused", "refused", "finished"]
    told = [event.message for event in run.events if event.kind == "refused"]
    assert told[0].startswith("a new worker died while it started: ")
    assert told[1:] == [f"rank 0 of generation {n} died; another was asked for" for n in (1, 2)]


@pytest.mark.slow
def test_a_run_whose_workers_cannot_start_says_so_in_one_line(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(elastic_pool, "MAX_LOST_NEWCOMERS", 1)
    with pytest.raises(
        HessianFlowError, match=r"2 new workers in a row were of no use, the last died .*logs$"
    ):
        ElasticRun(
            partial(DoomedJob, str(tmp_path), TOTAL), lambda r, s: 1, ElasticSettings(**STEPWISE)
        ).run()
    with pytest.raises(HessianFlowError, match=r"^no data under x: get it$"):
        ElasticRun(
            partial(RefusingJob, str(tmp_path), TOTAL), lambda r, s: 1, ElasticSettings(**STEPWISE)
        ).run()


@pytest.mark.slow
def test_a_cluster_without_room_is_not_waited_for(ray, tmp_path):
    """Each worker takes 2 of the 3 CPUs: the second never comes, the run ends all the same."""

    def policy(report, samples):
        for newcomer in run._cluster.pending:
            newcomer.requested_at -= 1000.0  # as if it had been requested that many seconds ago
        return 2

    settings = ElasticSettings(max_workers=2, num_cpus=2, **STEPWISE)
    run = ElasticRun(partial(WritingJob, str(tmp_path), TOTAL), policy, settings)
    check_result(tmp_path, run.run())
    assert changes(run) == ["started", "requested", "refused", "finished"]
    assert "no new worker after 600 s; training goes on without" in run.events[2].message
    settings = ElasticSettings(start_seconds=0.0)
    with pytest.raises(ValueError, match=r"0 of 1 workers came within 0 s"):
        ElasticRun(
            partial(WritingJob, str(tmp_path), TOTAL), lambda report, samples: 1, settings
        ).run()


@pytest.mark.slow
def test_what_cannot_go_on_says_so(ray, tmp_path):
    settings = ElasticSettings(**STEPWISE)
    with pytest.raises(Exception, match="a bug of the user's"):
        ElasticRun(partial(BrokenJob, str(tmp_path), TOTAL), lambda r, s: 1, settings).run()
    with pytest.raises(
        ValueError, match=r"6 failures in a row at update 0, the last: .*device-side assert"
    ):
        ElasticRun(partial(FailingJob, str(tmp_path), TOTAL), lambda r, s: 1, settings).run()
    crowd = ElasticRun(
        partial(PlainJob, str(tmp_path), TOTAL), lambda r, s: 9, ElasticSettings(9, 9)
    )
    with pytest.raises(
        ValueError, match=r"need more than the 3 CPUs of this machine: lower --min-workers"
    ):
        crowd.run()
    assert not crowd._cluster.pending, "nobody was asked for"


def test_settings_are_checked():
    with pytest.raises(
        ValueError, match="min_workers must lie between 1 and max_workers, got 3 and 2"
    ):
        ElasticSettings(min_workers=3, max_workers=2)
