import contextlib
import os
import random
import signal
from functools import partial

import pytest
import torch
from jobs import BrokenJob, DyingNewcomer, FailingJob, HangingJob, PatientJob, PlainJob, SlowJob, WritingJob
from ranks import LOCAL

from hessianflow.distributed.elastic import ElasticRun
from hessianflow.distributed.elastic_settings import ElasticSettings

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
TOTAL = 60
QUICK = {"stretch_seconds": 0.1, "timeout_seconds": 3.0}


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


def kinds(run) -> list[str]:
    return [event.kind for event in run.events]


def test_the_world_follows_the_batch(ray, tmp_path):
    """One worker for batches of 8, two for 16, one again at the end: the weights are those of one process."""

    def policy(report, samples):
        return 1 if report.updates >= 50 else report.batch_size // report.microbatch_size

    seen = []
    settings = ElasticSettings(max_workers=2, **QUICK)
    run = ElasticRun(partial(PatientJob, str(tmp_path), TOTAL), policy, settings, seen.append)
    check_result(tmp_path, run.run())
    assert seen == run.events
    events = [event for event in run.events if event.kind != "slow"]  # a busy machine may make it so
    assert [event.kind for event in events] == ["started", "requested", "joined", "left", "finished"]
    assert [event.workers for event in events] == [1, 1, 2, 1, 1]
    joined, left = events[2:4]
    assert joined.pause + left.pause < 1.0
    # The newcomer started while the others trained: updates were made between asking and joining.
    assert joined.updates > events[1].updates
    assert {sample.workers for sample in run.samples} == {1, 2}
    assert sum(s.examples_per_second > 0 for s in run.samples) == len(run.samples)


def test_a_killed_member_is_replaced(ray, tmp_path):
    """Two of the processes are killed at boundaries and within stretches; no example is lost or counted twice."""
    dice, killed = random.Random(0), []

    def policy(report, samples):
        pids = [int(name) for name in os.listdir(tmp_path) if name.isdigit() and int(name) != os.getpid()]
        if report.updates in range(10, 50) and len(killed) < 2 and report.updates > 18 * len(killed):
            victim = dice.choice(sorted(set(pids) - set(killed)))
            killed.append(victim)
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        return 2

    settings = ElasticSettings(min_workers=2, max_workers=2, snapshot_seconds=0.5, **QUICK)
    run = ElasticRun(partial(WritingJob, str(tmp_path), TOTAL, 0.05), policy, settings)
    check_result(tmp_path, run.run())
    assert len(killed) == 2
    assert "died" in kinds(run)
    assert "restored" in kinds(run)


def test_the_only_member_dies(ray, tmp_path):
    killed = []

    def policy(report, samples):
        if report.updates >= 20 and not killed:
            killed.extend(int(name) for name in os.listdir(tmp_path) if name.isdigit())
            os.kill(killed[0], signal.SIGKILL)
        return 1

    settings = ElasticSettings(snapshot_seconds=0.2, **QUICK)
    run = ElasticRun(partial(WritingJob, str(tmp_path), TOTAL, 0.02), policy, settings)
    check_result(tmp_path, run.run())
    assert kinds(run) == ["started", "died", "restored", "finished"]
    assert 0 <= run.events[2].updates <= run.events[1].updates


def test_a_hung_member_is_ended(ray, tmp_path):
    settings = ElasticSettings(min_workers=2, max_workers=2, **QUICK)
    run = ElasticRun(partial(HangingJob, str(tmp_path), TOTAL), lambda report, samples: 2, settings)
    check_result(tmp_path, run.run())
    assert "hung" in kinds(run)


def test_a_slow_member_is_noted(ray, tmp_path):
    settings = ElasticSettings(min_workers=2, max_workers=2, **QUICK)
    run = ElasticRun(partial(SlowJob, str(tmp_path), TOTAL), lambda report, samples: 2, settings)
    check_result(tmp_path, run.run())
    assert "slow" in kinds(run)
    assert "rank 1" in next(event.message for event in run.events if event.kind == "slow")


def test_a_cluster_without_room_is_not_waited_for(ray, tmp_path):
    """Each worker takes 5 of the 8 CPUs: the second never comes, the run ends all the same."""
    settings = ElasticSettings(max_workers=2, num_cpus=5, start_seconds=20, **QUICK)
    run = ElasticRun(partial(WritingJob, str(tmp_path), TOTAL, 0.02), lambda report, samples: 2, settings)
    check_result(tmp_path, run.run())
    assert kinds(run) == ["started", "requested", "finished"]
    settings = ElasticSettings(max_workers=2, num_cpus=5, start_seconds=0.01, **QUICK)
    with pytest.raises(ValueError, match=r"0 of 1 workers came within 0\.01 s"):
        ElasticRun(partial(WritingJob, str(tmp_path), TOTAL), lambda report, samples: 2, settings).run()


def test_a_newcomer_that_dies_is_done_without(ray, tmp_path):
    settings = ElasticSettings(max_workers=2, start_seconds=30, **QUICK)
    run = ElasticRun(partial(DyingNewcomer, str(tmp_path), TOTAL, 0.05), lambda report, samples: 2, settings)
    check_result(tmp_path, run.run())
    assert kinds(run)[:3] == ["started", "requested", "refused"]
    assert "died while it started" in run.events[2].message
    assert kinds(run)[3:] == ["finished"], "asked again only after 30 s"


def test_what_cannot_go_on_says_so(ray, tmp_path):
    with pytest.raises(Exception, match="a bug of the user's"):
        ElasticRun(partial(BrokenJob, str(tmp_path), TOTAL), lambda r, s: 1, ElasticSettings(**QUICK)).run()
    with pytest.raises(ValueError, match=r"6 failures in a row at update 0, the last: .*device-side assert"):
        ElasticRun(partial(FailingJob, str(tmp_path), TOTAL), lambda r, s: 1, ElasticSettings(**QUICK)).run()
    crowd = ElasticRun(partial(PlainJob, str(tmp_path), TOTAL), lambda r, s: 9, ElasticSettings(9, 9))
    with pytest.raises(ValueError, match=r"need more than the 8 CPUs of this machine: lower --min-workers"):
        crowd.run()


def test_settings_are_checked():
    with pytest.raises(ValueError, match="min_workers must lie between 1 and max_workers, got 3 and 2"):
        ElasticSettings(min_workers=3, max_workers=2)
