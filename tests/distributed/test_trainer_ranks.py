"""The trainer on two gloo ranks against the trainer in one process, which other tests hold against
plain loops."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainers import (
    accumulating,
    build,
    clipped,
    compared,
    contrastive,
    ended,
    freezing,
    growing,
    masked,
    measured,
    normalised,
    of_model_and_batch,
    own_loss,
    paired,
    plain,
    poisoned,
    preempted,
    refused,
    resumed,
    rolled_back,
    run,
    skewed,
    tiny,
    unfrozen,
    unsettled,
    untimed,
)

from hessianflow import History
from hessianflow.distributed import GroupWorld, run_simulated
from hessianflow.distributed.launch import run_local
from hessianflow.runs import checkpoints
from hessianflow.training import Checkpoints, saving


def check_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """float64 and 20 steps of momentum: rounding differs by the order of sums only."""
    assert torch.allclose(found["weights"], expected["weights"], rtol=0, atol=1e-10)
    assert [row["kind"] for row in found["rows"]] == [row["kind"] for row in expected["rows"]]
    for row, other in zip(found["rows"], expected["rows"], strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            # Losses are added up in float32; eigenvalues are all float64.
            tolerance = 0 if key == "eigenvalue" else 1e-6
            close = (
                pytest.approx(other[key], abs=1e-8, rel=tolerance)
                if isinstance(value, float)
                else other[key]
            )
            assert value == close, (key, row, other)


SETTINGS = [
    *(plain, accumulating, clipped, growing, tiny, skewed, freezing, masked, own_loss),
    of_model_and_batch,
]


@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: options.__name__)
def test_two_ranks_equal_one_process(options):
    expected = run(None, options)
    first, second = run_local(run, 2, options)
    check_equal(first, expected)
    assert torch.equal(first["weights"], second["weights"]), "ranks must stay bitwise together"
    assert first["rows"] == second["rows"], "every rank gets rank 0's records"
    assert (first["summary"]["world_size"], expected["summary"]["world_size"]) == (2, 1)
    assert first["summary"]["updates"] == expected["summary"]["updates"]


def test_a_loss_that_ranks_may_not_cut_is_refused_on_all_of_them():
    for message in run_local(ended, 2, contrastive):
        assert "cannot be cut" in message or "as the mean over parts" in message


def test_more_parameters_during_a_run_are_refused_on_every_rank():
    for message in run_local(unfrozen, 2):
        assert "trained from now on: 1.0.weight" in message
        assert (
            "on 2 ranks, whose gradients are summed by a plan made at the start, only freezing"
            " works" in message
        )


def test_the_batch_grew_on_the_eigenvalue():
    """Else the comparison above would say nothing about decisions."""
    rows = run(None, growing)["rows"]
    growths = [row for row in rows if row["kind"] == "batch"]
    assert [row["to"] for row in growths] == [32, 64]
    assert "eigenvalue fell" in growths[0]["reason"]
    assert rows[-1]["updates"] >= 16


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [(2, 1), (1, 2), (2, 3)])
def test_a_run_goes_on_at_another_world_size(tmp_path: Path, worlds: tuple[int, int]):
    """Stopped in the midst of the second epoch; shards and decisions go on as if the world had
    always been one."""
    folder = str(tmp_path / "run")
    before, after = worlds
    summary = run_local(preempted, before, folder, 8, before - 1)[0]
    assert (summary["status"], summary["updates"]) == ("preempted", 8)
    results = run_local(resumed, after, folder)
    expected = run(None, growing)
    assert torch.allclose(results[0]["weights"], expected["weights"], rtol=0, atol=1e-10)
    assert all(torch.equal(results[0]["weights"], other["weights"]) for other in results)
    kept = [row for row in results[0]["rows"] if row["kind"] != "event"]
    check_equal({**results[0], "rows": kept}, expected)
    assert untimed(History.load(folder).records) == results[0]["rows"]


def test_checkpoints_by_the_clock_are_a_minute_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A step takes 20 s: saved after the third of 5 in an epoch, and at its end. Rank 1 writes
    nothing itself."""
    seconds, seen = [0.0], []
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: seconds[0]))

    def watch(inputs, targets, progress):
        seconds[0] += 20
        seen.append(checkpoints.load(tmp_path / "run" / "checkpoints" / "last.pt")["updates"])
        return inputs, targets

    def train(reducer) -> None:
        options = {"transform": watch} if reducer.rank == 0 else {}
        further = {
            "run_dir": tmp_path / "run",
            "checkpoints": Checkpoints(every_minutes=1),
            "epochs": 2,
        }
        build(GroupWorld(reducer), lambda *_: options, **further).fit()

    run_simulated(train, 2)
    assert seen == [0, 0, 0, 3, 3, 5, 5, 5, 8, 8]


@pytest.mark.parametrize("where", ["batch", "buffer"])
def test_what_diverges_on_one_rank_ends_all_at_the_same_step(where: str):
    """In the second epoch of 5 steps, found when that ends at the latest."""
    first, second = run_local(poisoned, 2, where, None)
    assert first == second
    assert "not finite, or exploded, in epoch 2" in first[0]
    assert ("at update 8" in first[0]) == (where == "batch")


def test_all_ranks_go_back_together(tmp_path: Path):
    first, second = run_local(rolled_back, 2, str(tmp_path / "two"))
    assert torch.equal(first["weights"], second["weights"])
    one = rolled_back(None, str(tmp_path / "one"))
    # when it is seen depends on the clock, what is done about it does not
    for result in (first, one):
        result["kept"] = {
            **result,
            "rows": [row for row in result["rows"] if row["kind"] != "event"],
        }
    check_equal(first["kept"], one["kept"])
    assert [row["event"] for row in first["rows"] if row["kind"] == "event"] == [
        "diverged",
        "rollback",
    ]


def test_all_ranks_end_where_there_is_nothing_to_undo(tmp_path: Path):
    """Decided by rank 0, which alone holds the records."""
    first, second = run_local(poisoned, 2, "batch", str(tmp_path / "run"))
    assert first == second
    assert "the last good checkpoint is" in first[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("observer", "Alone sees the gradients of one rank only: give it a join"),
        ("staleness", "staleness 2 holds batches of one process: use staleness 0 on 2 ranks"),
        ("wrapped", "wrapped in DistributedDataParallel: pass the bare module"),
        ("data", "list cannot be shared out to 2 ranks: it lacks set_shard"),
        ("cut", "microbatch_size 8 may cut the parts of ranks differently"),
        ("cpu", "SyncBatchNorm runs on GPUs only, this model is on the cpu"),
        ("late", "SyncBatchNorm needs all ranks from the start"),
        ("settings", "epochs is 2 on rank 0 but 3 on rank 1"),
        ("disk", "cannot write run directory /proc/nowhere"),
    ],
)
def test_refusals_reach_every_rank(what: str, message: str):
    assert [message in said for said in run_local(refused, 2, what)] == [True, True]


def test_moments_mean_the_same_at_any_world_size():
    """Two steps of 16 in microbatches of 4 on one process; on ranks of 8 examples with microbatches
    of 4 the same."""
    alone, (first, second) = measured(None, (4,)), run_local(measured, 2, (4, 4))
    assert first == second == pytest.approx(alone, rel=1e-10)
    # 1 of 8 and 4 of 2 a step: harmonic mean 5 / (1/8 + 4/2)
    uneven = run_local(measured, 2, (8, 2))[0]
    assert uneven["small_batch_size"] == pytest.approx(5 / (1 / 8 + 4 / 2))
    assert uneven["gradient_sum_sq"] == pytest.approx(alone["gradient_sum_sq"], rel=1e-10)


def test_norms_of_microbatches_are_those_of_all_ranks():
    first, second = run_local(compared, 2)
    assert torch.equal(first, second)
    assert torch.allclose(first, compared(None), rtol=0, atol=1e-10)


def test_statistics_are_averaged_and_dropout_differs():
    (buffers, noise, losses), (others, other_noise, _) = run_local(normalised, 2)
    assert torch.equal(buffers, others)
    assert not torch.equal(noise, other_noise), "ranks must not drop the same units"
    assert losses[0] == pytest.approx(losses[1], rel=1e-12), "evaluated as it was left"


def test_statistics_that_have_not_settled_are_measured_anew_on_all_ranks():
    """The mean over ranks of the variances within their parts lies below that of the whole, by that
    of their means."""
    (first, loss, said), (second, other_loss, other_said) = run_local(unsettled, 2)
    assert torch.equal(first, second)
    assert (loss, said) == (other_loss, other_said)
    whole, loss_of_one, said_by_one = unsettled(None)
    assert said == said_by_one == ["remeasured"]
    assert torch.all((first[:4] - whole[:4]).abs() < 0.02 * whole[4:].sqrt()), (
        "the first step differed by its parts"
    )
    assert torch.allclose(first[4:], whole[4:], rtol=0.2)
    assert loss == pytest.approx(loss_of_one, rel=0.2)


def test_layers_that_exchange_statistics_run_as_often_on_every_rank():
    """By hand: rows x of [0, 1, 4, 9, 16, 25] less their mean, weights 1, loss mean(sum(x)^2)."""
    (passes, gradient, message), (others, same, _) = run_local(paired, 2)
    rows = torch.tensor([[0.0, 1.0], [4.0, 9.0], [16.0, 25.0]])
    rows = rows - rows.mean(0)
    assert (passes, others) == (1, 1)
    assert torch.equal(gradient, same)
    assert torch.allclose(gradient, (2 * rows.sum(1, keepdim=True) * rows).mean(0, keepdim=True))
    assert "twins cannot be trained with SyncBatchNorm" in message


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "hessianflow",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_torchrun_trains_one_process_goes_on(tmp_path: Path):
    folder = str(tmp_path / "run")
    options = ["--device", "cpu", "--epochs", "1", "--train-examples", "200", "--plots", "false"]
    done = torchrun("train", *options, "--run-dir", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished: test accuracy") == 1, "one rank speaks"
    summary = History.load(folder).summary
    assert (summary["world_size"], summary["examples"], summary["updates"]) == (2, 200, 7)


def apart(rank: int, port: int, *arguments: str) -> subprocess.Popen[str]:
    """One rank by hand: torchrun would start all with the same command."""
    place = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
    }
    environment = {**os.environ, **place, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hessianflow", "train", "--device", "cpu", *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_ranks_with_other_settings_are_refused_in_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [apart(rank, port, "--lr", f"0.{rank + 1}") for rank in range(2)]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "lr is 0.1 on rank 0 but 0.2 on rank 1" in said[0]
    assert (said[0].count("\n"), said[1]) == (1, "")
