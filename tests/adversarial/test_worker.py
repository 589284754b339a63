"""The attacking process must change nothing but where the work is done: interleaving is the oracle,
bit for bit."""

import copy
from multiprocessing import Pipe
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import bright_or_dark
from stopping import StopAfter
from torch import nn
from torch.nn.functional import cross_entropy

from hessianflow import AdaptiveBatchTrainer
from hessianflow.adversarial import FGSM, PGD, ConcurrentAdversary, WorkerProcess
from hessianflow.control import FixedBatch
from hessianflow.data import DeviceBatches
from hessianflow.normalisation import split_batch_norm
from hessianflow.training import Ahead, Passes, exposed_loss

RANGE = (0.0, 1.0)


@pytest.fixture
def worker():
    made = WorkerProcess(threads=1)
    yield made
    made.close()


def data() -> DeviceBatches:
    return bright_or_dark(40, shape=(1, 6, 6))


def network() -> nn.Module:
    torch.manual_seed(0)
    return split_batch_norm(
        nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
        )
    )


def train(runner: Any, run_dir: Path, *, stop_after: int = 0) -> AdaptiveBatchTrainer:
    model = network()
    adversary = ConcurrentAdversary(
        PGD(0.1, value_range=RANGE, steps=2), share=0.5, staleness=2, runner=runner
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options: dict[str, Any] = {
        "epochs": 3,
        "controller": FixedBatch(8),
        "passes": Passes(precision="bf16"),
    }
    stop = StopAfter(stop_after)
    stop.trainer = AdaptiveBatchTrainer(
        model,
        data(),
        optimizer=optimizer,
        loss_fn=cross_entropy,
        adversary=adversary,
        run_dir=run_dir,
        transform=stop if stop_after else None,
        **options,
    )
    return stop.trainer


def test_training_resumed_through_another_process_ends_as_interleaved(
    worker: WorkerProcess, tmp_path: Path
):
    """Random starts, shares, split statistics, autocast; stopped in mid-epoch with attacks under
    way."""
    whole = train(None, tmp_path / "whole")
    whole.fit()
    broken = train(worker, tmp_path / "run", stop_after=9 * 8)
    assert broken.fit().summary["status"] == "preempted"
    assert broken.progress.examples % broken.progress.examples_per_epoch > 0
    again = train(worker, tmp_path / "other")
    again.resume(tmp_path / "run")
    for (name, a), b in zip(
        whole.model.state_dict().items(), again.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    first, second = (made.state_dict()["parts"]["adversary"] for made in (whole, again))
    assert first == second


class Failing(FGSM):
    """Fails in the other process, not while it is sent there."""

    def perturb(self, model, inputs, targets, share, microbatch_size=None):
        raise ArithmeticError("no attack today")


def test_what_goes_wrong_there_is_told_here(worker: WorkerProcess):
    model, (x, y) = network(), next(iter(data()))
    wait = ConcurrentAdversary(Failing(0.1, value_range=RANGE), runner=worker).attack(
        model, x, y, 1.0
    )
    with pytest.raises(
        ValueError, match="the attack failed in its process: ArithmeticError: no attack today"
    ):
        wait()


@pytest.mark.slow
def test_a_failed_attack_is_told_each_time_and_others_go_on(worker: WorkerProcess):
    model, (x, y) = network(), next(iter(data()))
    failing = ConcurrentAdversary(Failing(0.1, value_range=RANGE), runner=worker)
    fine = ConcurrentAdversary(FGSM(0.1, value_range=RANGE), runner=worker)
    expected = ConcurrentAdversary(FGSM(0.1, value_range=RANGE)).attack(model, x, y, 1.0)()
    wait = failing.attack(model, x, y, 1.0)
    # nobody has asked for the one before
    assert torch.equal(fine.attack(model, x, y, 1.0)(), expected)
    for _ in range(2):
        with pytest.raises(ValueError, match="no attack today"):
            wait()
    assert torch.equal(fine.attack(model, x, y, 1.0)(), expected)


@pytest.mark.slow
def test_a_process_that_cannot_start_leaves_nothing(
    worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch
):
    model, (x, y) = network(), next(iter(data()))
    ahead = ConcurrentAdversary(FGSM(0.1, value_range=RANGE), runner=worker)

    def refuse(process: Any) -> None:
        raise OSError("no more processes")

    ends = Pipe()
    with monkeypatch.context() as patch:
        patch.setattr(SpawnContext, "Pipe", lambda context: ends)
        patch.setattr(SpawnProcess, "_Popen", staticmethod(refuse))
        with pytest.raises(OSError, match="no more processes"):
            ahead.attack(model, x, y, 1.0)
        worker.close()
    assert all(end.closed for end in ends)
    assert ahead.attack(model, x, y, 1.0)().shape == x.shape


@pytest.mark.slow
def test_a_worker_that_was_killed_is_named(worker: WorkerProcess):
    model, (x, y) = network(), next(iter(data()))
    ahead = ConcurrentAdversary(FGSM(0.1, value_range=RANGE), runner=worker)
    ahead.attack(model, x, y, 1.0)()
    worker._end.peek()[2][0].kill()
    for _ in range(2):  # while it ends, or after that
        with pytest.raises(ValueError, match="the process that attacks has ended"):
            ahead.attack(model, x, y, 1.0)()
        worker._end.peek()[2][0].join()
    worker.close()
    assert ahead.attack(model, x, y, 1.0)().shape == x.shape


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="threads must be a whole number >= 1, got 0"):
        WorkerProcess(threads=0)

    class Local(nn.Linear):
        """Cannot be found by its name in another process."""

    x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    ahead = ConcurrentAdversary(FGSM(0.1, value_range=None), runner=WorkerProcess())
    with pytest.raises(ValueError, match="cannot be sent to another process"):
        ahead.attack(Local(3, 2), x, y, 1.0)
    runner = WorkerProcess(threads=1)
    unnamed = FGSM(
        0.1, value_range=None, loss_fn=lambda outputs, targets: cross_entropy(outputs, targets)
    )
    with pytest.raises(ValueError, match="cannot be sent to another process"):
        ConcurrentAdversary(unnamed, runner=runner).attack(nn.Linear(3, 2), x, y, 1.0)
    twins = ConcurrentAdversary(FGSM(0.1, value_range=None), runner=runner).attack(
        nn.Linear(3, 2), x, y, 1.0
    )
    assert twins().shape == x.shape  # it goes on
    runner.close()


def test_a_loop_of_ones_own_may_use_it(worker: WorkerProcess):
    ends = []
    for runner in (None, worker):
        model = network().train()
        adversary = ConcurrentAdversary(FGSM(0.1, value_range=RANGE), staleness=1, runner=runner)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for exposure in Ahead([*data()], adversary, model):
            optimizer.zero_grad()
            exposed_loss(model, exposure, cross_entropy).backward()
            optimizer.step()
        ends.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values(), strict=True))
