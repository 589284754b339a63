"""What a checkpoint must hold: each test fails if one part of the state is left out of it."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import bright_or_dark
from stopping import StopAfter
from torch import Tensor, nn
from torch.nn import functional as F

from hessianflow import AdaptiveBatchTrainer
from hessianflow.adversarial import PGD
from hessianflow.control import AdaBatch, FixedBatch, NoiseScale
from hessianflow.data import DeviceBatches
from hessianflow.optim import CLARS, GradientMoments
from hessianflow.runs import checkpoints
from hessianflow.training import Passes, Reporting
from hessianflow.training.microbatch import MicrobatchSize

N = 50


def data(batch_size: int = 8) -> DeviceBatches:
    return bright_or_dark(N, batch_size)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 2))


class Temperature(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs * self.scale, targets)


def attacked(model: nn.Module) -> dict[str, Any]:
    """Random starts, counted by the adversary; half of each batch."""
    return {
        "adversary": PGD(0.1, share=0.5, value_range=(0.0, 1.0), steps=2),
        "controller": FixedBatch(8),
    }


def by_noise(model: nn.Module) -> dict[str, Any]:
    """Moments of microbatch gradients, averaged over steps, drive the batch."""
    controller = NoiseScale(8, 40)
    return {
        "observers": [GradientMoments()],
        "controller": controller,
        "passes": Passes(microbatch_size=2),
    }


def clars(model: nn.Module) -> dict[str, Any]:
    """Norms of microbatch gradients enter the optimizer."""
    optimizer = CLARS(model.parameters(), 0.1, momentum=0.9)
    return {
        "optimizer": optimizer,
        "observers": [optimizer.norms],
        "passes": Passes(microbatch_size=2),
    }


def half(model: nn.Module) -> dict[str, Any]:
    """A loss scale that moves: it doubles every few steps from where it stands."""
    return {"passes": Passes(precision="fp16")}


def learned_loss(model: nn.Module) -> dict[str, Any]:
    loss = Temperature()
    return {
        "loss_fn": loss,
        "optimizer": torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1),
    }


def growing(model: nn.Module) -> dict[str, Any]:
    return {"controller": AdaBatch(8, 32, every_epochs=1)}


def trainer(model: nn.Module, run_dir: Path | None, **options: Any) -> AdaptiveBatchTrainer:
    settings: dict[str, Any] = {
        "epochs": 3,
        "loss_fn": F.cross_entropy,
        "reporting": Reporting(show_progress=False),
        "run_dir": run_dir,
    }
    if "optimizer" not in options:
        settings["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings |= options
    made = AdaptiveBatchTrainer(model, data(), **settings)
    if settings.get("precision") == "fp16":
        start = AdaptiveBatchTrainer(model, data(), **(settings | {"run_dir": None})).state_dict()
        # or it would never move in so short a run
        start["parts"]["loss scale"]["growth_interval"] = 4
        made.load_state_dict(start)
    return made


def state_of(made: AdaptiveBatchTrainer) -> dict[str, Any]:
    """All that is trained or counted, without clocks."""
    state = made.state_dict()
    parts = {name: part for name, part in state["parts"].items() if name != "totals"}
    return {"model": state["model"], "optimizer": state["optimizer"], "parts": parts}


def assert_equal(first: Any, second: Any, where: str = "") -> None:
    if isinstance(first, Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal(first[key], second[key], f"{where} {key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_equal(*pair, f"{where} {number}")
    else:
        assert first == second, where


@pytest.mark.parametrize("way", [attacked, by_noise, clars, half, learned_loss, growing])
def test_resumed_in_mid_epoch_every_part_goes_on_where_it_was(way: Any, tmp_path: Path):
    """Weights and every stateful part equal those of the run that was left alone, bit for bit."""
    model = network()
    whole = trainer(model, tmp_path / "whole", **way(model))
    whole.fit()
    model, stop = network(), StopAfter(70)
    stop.trainer = trainer(model, tmp_path / "run", transform=stop, **way(model))
    assert stop.trainer.fit().summary["status"] == "preempted"
    torch.manual_seed(99)
    model = network().requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    again = trainer(model, None, **way(model))
    again.resume(tmp_path / "run")
    assert_equal(state_of(again), state_of(whole))


def test_the_parameter_of_a_loss_is_trained_like_in_the_bare_loop():
    """Its gradient is dropped before every step, and momentum moves it as torch would."""
    found = []
    for bare in (True, False):
        model, loss = network(), Temperature()
        optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1, momentum=0.9)
        if bare:
            for _, (x, y) in ((e, batch) for e in range(2) for batch in data_of(e)):
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()
        else:
            trainer(model, None, loss_fn=loss, optimizer=optimizer, epochs=2).fit()
        found.append(
            (float(loss.scale.detach()), nn.utils.parameters_to_vector(model.parameters()).detach())
        )
    assert found[0][0] == found[1][0] != 1.5
    assert torch.equal(found[0][1], found[1][1])


def data_of(epoch: int):
    """The batches of one epoch from a stream that starts afresh."""
    stream = data()
    for _ in range(epoch):
        list(stream)
    return list(stream)


def traced(
    ids: list[Tensor], microbatch_size: int, run_dir: Path | None, stop_after: int
) -> AdaptiveBatchTrainer:
    """A trainer on images that say which example they are, and whose batch grows; `ids` gets those
    of each batch."""
    images = torch.arange(N, dtype=torch.float64).view(N, 1, 1, 1).expand(N, 1, 4, 4) / N
    stop = StopAfter(stop_after)

    def trace(inputs: Tensor, targets: Tensor, progress: Any) -> tuple[Tensor, Tensor]:
        ids.append((inputs[:, 0, 0, 0] * N).round().long())
        return stop(inputs, targets, progress)

    model = network().double()
    stop.trainer = AdaptiveBatchTrainer(
        model,
        DeviceBatches(images, (images[:, 0, 0, 0] > 0.5).long(), 8, dtype=torch.float64),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        loss_fn=F.cross_entropy,
        controller=AdaBatch(8, 32, every_epochs=1),
        epochs=3,
        passes=Passes(microbatch_size=microbatch_size),
        run_dir=run_dir,
        transform=trace,
    )
    return stop.trainer


@pytest.mark.parametrize("stop_after", [8, 24, 52, 90])
def test_another_microbatch_size_repeats_and_skips_no_example(stop_after: int, tmp_path: Path):
    """Ids traced through both processes; the updates are the same to rounding, so the weights end
    close by."""
    expected: list[Tensor] = []
    whole = traced(expected, 8, None, 3 * N + 1)
    whole.fit()
    ids: list[Tensor] = []
    assert traced(ids, 8, tmp_path / "run", stop_after).fit().summary["status"] == "preempted"
    resumed = traced(ids, 3, None, 3 * N + 1)
    assert resumed.resume(tmp_path / "run").summary["status"] == "finished"
    for epoch in torch.cat(ids).split(N):
        assert torch.equal(epoch.sort().values, torch.arange(N))
    assert [batch.tolist() for batch in ids] == [batch.tolist() for batch in expected]
    first, second = (
        nn.utils.parameters_to_vector(made.model.parameters()) for made in (resumed, whole)
    )
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)


def test_stopped_and_fitted_again_without_a_run_directory_goes_on():
    """The trainer itself holds the place; a request made before the start stops at once and is used
    up."""
    expected = network()
    trainer(expected, None).fit()
    model, stop = network(), StopAfter(70)
    made = stop.trainer = trainer(model, None, transform=stop)
    made.request_stop()
    assert made.fit().summary["examples"] == 0
    first = made.fit()
    assert (first.summary["status"], first.summary["examples"]) == ("preempted", 50 + 3 * 8)
    last = made.fit()
    assert last.summary["status"] == "finished"
    assert [row["epoch"] for row in last.epochs] == [1, 2, 3]
    assert torch.equal(*(nn.utils.parameters_to_vector(m.parameters()) for m in (model, expected)))


class Stopped(BaseException):
    """Ends a write where a SIGKILL would: no handler of an ordinary error sees it."""


@pytest.mark.parametrize("name", ["fsync", "link", "replace"])
@pytest.mark.parametrize("call", range(4))
def test_a_checkpoint_write_cut_short_anywhere_leaves_one_to_continue_from(
    name: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Death before any of the system calls of a save: the newest that loads is the old or the new
    one, whole."""
    last, calls = tmp_path / "last.pt", []
    for n in (1, 2, 3):
        checkpoints.save(last, {"n": n, "x": torch.zeros(100), "history_bytes": 0}, keep=3)
    real = getattr(checkpoints.os, name)

    def dying(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == call + 1:
            raise Stopped
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, name, dying)
        with contextlib.suppress(Stopped):
            checkpoints.save(last, {"n": 4, "x": torch.zeros(100), "history_bytes": 0}, keep=3)
    state, _, warning = checkpoints.load_newest(tmp_path, 0)
    assert (state["n"] in (3, 4), warning) == (True, None)
    checkpoints.save(
        last, {"n": 5, "history_bytes": 0}, keep=3
    )  # what was left behind is in nobody's way
    assert checkpoints.load_newest(tmp_path, 0)[0]["n"] == 5


def test_what_a_search_for_the_microbatch_found_is_kept():
    found = MicrobatchSize("auto", 4, torch.device("cpu"))
    found.load_state_dict({"size": 16, "limit": 16, "searching": False})
    again = MicrobatchSize("auto", 4, torch.device("cpu"))
    again.load_state_dict(found.state_dict())
    assert again.begin(1000) == 16
    by_hand = MicrobatchSize(4, 4, torch.device("cpu"))
    by_hand.load_state_dict(found.state_dict())
    assert by_hand.begin(1000) == 4
