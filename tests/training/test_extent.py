"""Runs and epochs counted in updates, examples or passes over the data."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import TensorDataset

from hessianflow import AdaptiveBatchTrainer, HessianFlowError
from hessianflow.adversarial import FGSM
from hessianflow.control import (
    ABS,
    ABSA,
    CABS,
    AdaBatch,
    CriticalBatch,
    DiveBatch,
    GrowInsteadOfDecay,
    NoiseScale,
    NormTest,
    Seesaw,
    TimedSchedule,
    Warmup,
)
from hessianflow.curvature import CurvatureProbe
from hessianflow.data import AdaptiveBatches
from hessianflow.interfaces import UNKNOWN, Batch, BatchController, Progress
from hessianflow.optim import GradientMoments
from hessianflow.training import Every, Passes, Reporting, Schedule
from hessianflow.training.course import Course
from hessianflow.training.extent import Extent, Position

N = 100
SOURCE = torch.Generator().manual_seed(0)
DATA = TensorDataset(torch.randn(N, 4, generator=SOURCE), torch.randint(3, (N,), generator=SOURCE))


def made(batch_size: int = 8, **options: Any) -> AdaptiveBatchTrainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    settings: dict[str, Any] = {
        "optimizer": SGD(model.parameters(), lr=0.1),
        "loss_fn": nn.CrossEntropyLoss(),
        "reporting": Reporting(show_progress=False),
        "train_data": AdaptiveBatches(DATA, batch_size),
        "eval_data": DATA.tensors,
    }
    return AdaptiveBatchTrainer(model, **(settings | options))


def epochs(trainer: AdaptiveBatchTrainer) -> list[tuple[int, int, int]]:
    return [(row["epoch"], row["updates"], row["examples"]) for row in trainer.fit().epochs]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # A pass has 13 updates, the last two of which share 12 examples as 6 and 6.
        ({"epochs": 2}, [(1, 13, 100), (2, 26, 200)]),
        ({"max_updates": 15}, [(1, 13, 100), (2, 15, 116)]),
        ({"max_examples": 150}, [(1, 13, 100), (2, 20, 156)]),
        ({"epochs": 1, "max_updates": 15}, [(1, 13, 100)]),
        ({"max_updates": 7, "every": Every(updates=3)}, [(1, 3, 24), (2, 6, 48), (3, 7, 56)]),
        ({"epochs": 1, "every": Every(updates=6)}, [(1, 6, 48), (2, 12, 96), (3, 13, 100)]),
        # The multiples of 30 are passed at 32, 64 and 96: they do not drift.
        (
            {"epochs": 1, "every": Every(examples=30)},
            [(1, 4, 32), (2, 8, 64), (3, 12, 96), (4, 13, 100)],
        ),
        # Across the end of a pass, which ends no epoch.
        ({"epochs": 2, "every": Every(updates=14)}, [(1, 14, 108), (2, 26, 200)]),
        ({"max_examples": 50, "every": Every(updates=4)}, [(1, 4, 32), (2, 7, 56)]),
    ],
)
def test_epochs_and_the_end_of_a_run(
    options: dict[str, Any], expected: list[tuple[int, int, int]]
) -> None:
    trainer = made(**options)
    assert epochs(trainer) == expected
    assert trainer.progress.is_over
    assert trainer.progress.fraction == 1
    assert trainer.summary()["status"] == "finished"


def test_a_batch_that_spans_several_epochs_ends_one_and_leaves_no_backlog() -> None:
    extent = Extent(1000, max_examples=320, every=Every(examples=32))
    position = Position()
    for examples in (80, 80, 8, 8, 8, 8):
        position = extent.after(position, examples)
    # 80 and 160 pass multiples of 32, as do 192 = 160 + 4 * 8 and no update before it.
    assert (position.epoch, position.examples) == (3, 192)


@pytest.mark.parametrize(
    ("extent", "total"),
    [
        (Extent(100, passes=3), {"epochs": 3, "updates": None, "examples": 300}),
        (Extent(100, max_examples=250), {"epochs": 3, "updates": None, "examples": 250}),
        (Extent(100, max_updates=9), {"epochs": None, "updates": 9, "examples": None}),
        (
            Extent(UNKNOWN, max_updates=9, every=Every(updates=4)),
            {"epochs": 3, "updates": 9, "examples": None},
        ),
        (
            Extent(100, passes=2, max_updates=9, every=Every(updates=4)),
            {"epochs": None, "updates": None, "examples": None},
        ),
        (
            Extent(100, passes=2, max_examples=50, every=Every(examples=40)),
            {"epochs": 2, "updates": None, "examples": 50},
        ),
        (Extent(UNKNOWN, passes=2), {"epochs": 2, "updates": None, "examples": None}),
    ],
)
def test_the_length_of_a_run_in_each_unit(extent: Extent, total: dict[Any, int | None]) -> None:
    assert {unit: extent.total(unit) for unit in total} == total


def test_the_fraction_is_that_of_the_nearest_limit() -> None:
    extent = Extent(100, passes=10, max_updates=40, every=Every(updates=10))
    position = Position(epoch=2, updates=23, examples=184, steps=3, passes=1, read=84)
    progress = extent.progress(position)
    assert progress.epochs_passed == pytest.approx(2.3)
    assert progress.fraction == pytest.approx(23 / 40)
    assert Extent(100, passes=4).progress(Position(1, 150, 19, 50, 6)).fraction == 0.375


def test_the_fraction_reaches_1_if_the_data_end_early() -> None:
    extent = Extent(100, passes=1, max_updates=500)
    ended = extent.after(Position(updates=3, examples=24, read=24), 8, data_ended=True)
    assert ended.epoch == 1
    assert extent.progress(ended).is_over


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: made(), "a run needs an end: pass epochs, max_updates or max_examples"),
        (lambda: made(epochs=0), "epochs must be a whole number >= 1"),
        (lambda: made(max_updates=1.5), "max_updates must be a whole number >= 1"),
        (lambda: made(max_examples=-1), "max_examples must be a whole number >= 1"),
        (lambda: Every(), "either examples or updates, got None"),
        (lambda: Every(3, 4), "either examples or updates, got 3"),
        (lambda: Every(updates=0), "Every.updates must be a whole number >= 1"),
        (lambda: made(epochs=1, every=500), "every must be a hf.training.Every"),
        (
            lambda: made(epochs=2, every=Every(examples=30), controller=AdaBatch(8, 64)),
            "max_batch_size 64 is larger than the 30 examples of an epoch",
        ),
        (
            lambda: made(40, epochs=2, every=Every(examples=30)),
            "batch size 40 must lie between 1 and the 30 examples of an epoch",
        ),
    ],
)
def test_contradictory_limits_are_refused(make: Any, message: str) -> None:
    with pytest.raises(HessianFlowError) as caught:
        make()
    assert message in str(caught.value)


class Watched:
    """A controller that grows each time it is asked, and remembers the progress."""

    def __init__(self) -> None:
        self.inner = AdaBatch(4, 64, every_epochs=1)
        self.seen: list[Progress] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def update(self, progress: Progress, *arguments: Any) -> Any:
        self.seen.append(progress)
        return self.inner.update(progress, *arguments)


def test_a_controller_receives_the_progress_of_the_run() -> None:
    controller: Any = Watched()
    trainer = made(4, max_examples=90, every=Every(updates=3), controller=controller)
    assert epochs(trainer) == [(1, 3, 12), (2, 6, 36), (3, 9, 84), (4, 10, 100)]
    first = controller.seen[0]
    assert (first.epoch, first.examples, first.total_epochs) == (1, 12, None)
    assert first.epochs_passed == 1
    assert first.fraction == pytest.approx(12 / 90)
    assert len(controller.seen) == 3  # At the end there is nothing left to decide.


CONTROLLERS: Mapping[str, Callable[[], BatchController]] = {
    "absa": lambda: ABSA(8, 64, patience=1),
    "abs": lambda: ABS(8, 64, patience=1),
    "adabatch": lambda: AdaBatch(8, 64, every_epochs=2),
    "cabs": lambda: CABS(8, 64, min_batch_size=8),
    "critical": lambda: CriticalBatch(8, 64),
    "divebatch": lambda: DiveBatch(8, 64),
    "grow": lambda: GrowInsteadOfDecay(8, 64, milestones=[2]),
    "noise-scale": lambda: NoiseScale(8, 64),
    "norm-test": lambda: NormTest(8, 64),
    "seesaw": lambda: Seesaw(8, 64),
    "timed": lambda: TimedSchedule(8, [(2, 16), (3, 32)]),
    "warmup": lambda: Warmup(8, 64, warmup_epochs=2),
}


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("every", [Every(updates=3), Every(examples=64)])
def test_every_controller_decides_within_one_pass(name: str, every: Every) -> None:
    """Each changes the batch or the rate before a pass is complete, or says why it does not."""
    inputs, targets = DATA.tensors
    data = AdaptiveBatches(TensorDataset(inputs.repeat(20, 1), targets.repeat(20)), 8)
    controller = CONTROLLERS[name]()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = SGD(model.parameters(), lr=0.1)
    loss_fn = nn.CrossEntropyLoss()
    history = AdaptiveBatchTrainer(
        model,
        data,
        optimizer=optimizer,
        loss_fn=loss_fn,
        max_examples=800,
        every=every,
        controller=controller,
        adversary=FGSM(0.01, value_range=None),
        observers=[GradientMoments(accumulate=True)],
        probe=CurvatureProbe(model, loss_fn, data.sample(32)),
        schedule=Schedule(LinearLR(optimizer, 1.0, 0.1, total_iters=6)),
        passes=Passes(microbatch_size=4),
        reporting=Reporting(show_progress=False),
    ).fit()
    assert len(history.epochs) >= 3
    assert history.summary["examples"] < 20 * N
    assert history.of_kind("batch") or history.of_kind("signals")


def test_timed_asks_for_a_length_in_epochs() -> None:
    controller = TimedSchedule(8, [(1, 16)], decay_from=1)
    with pytest.raises(HessianFlowError, match="state the length of the run in epochs"):
        made(max_updates=9, controller=controller).fit()


class Stream:
    """A stream of unknown length, which ends after 40 examples."""

    num_examples = UNKNOWN
    batch_size = 8

    def __init__(self, examples: int = 40) -> None:
        self.examples = examples
        self.passes = 0

    def set_batch_size(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        for start in range(0, self.examples, self.batch_size):
            yield DATA[start : min(start + self.batch_size, self.examples)]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


@pytest.mark.parametrize(
    ("options", "expected", "passes"),
    [
        ({"epochs": 2}, [(1, 5, 40), (2, 10, 80)], 2),
        ({"epochs": 1, "every": Every(updates=3)}, [(1, 3, 24), (2, 5, 40)], 1),
        ({"epochs": 2, "every": Every(updates=4)}, [(1, 4, 32), (2, 8, 64), (3, 10, 80)], 2),
        ({"max_updates": 7}, [(1, 5, 40), (2, 7, 56)], 2),
    ],
)
def test_a_stream_of_unknown_length(
    options: dict[str, Any], expected: list[tuple[int, int, int]], passes: int
) -> None:
    stream = Stream()
    trainer = made(train_data=stream, **options)
    assert epochs(trainer) == expected
    assert stream.passes == passes
    assert trainer.settings()["examples_per_epoch"] is None


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(HessianFlowError, match="train_data gave no batch in epoch 1"):
        made(train_data=Stream(0), max_updates=3, every=Every(updates=1)).fit()


@pytest.mark.parametrize("every", [None, Every(updates=4), Every(examples=30)])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, every: Every | None) -> None:
    def run(folder: Path | None) -> AdaptiveBatchTrainer:
        return made(
            4,
            max_examples=230,
            every=every,
            run_dir=folder,
            controller=AdaBatch(4, 30, every_epochs=1),
        )

    whole = run(None)
    whole.fit()
    stopped = run(tmp_path / "run")

    class Stop:
        def write(self, row: Mapping[str, Any]) -> None:
            if row["kind"] == "epoch" and row["epoch"] == 2:
                stopped.request_stop()

        def close(self) -> None:
            pass

    stopped = made(
        4,
        max_examples=230,
        every=every,
        run_dir=tmp_path / "run",
        controller=AdaBatch(4, 30, every_epochs=1),
        reporting=Reporting([Stop()], show_progress=False),
    )
    assert stopped.fit().summary["status"] == "preempted"
    resumed = run(None)
    history = resumed.resume(tmp_path / "run")
    assert history.summary["status"] == "finished"
    assert [row["updates"] for row in history.epochs] == [
        row["updates"] for row in whole.records if row["kind"] == "epoch"
    ]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_schedule_that_takes_a_step_per_update() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = LinearLR(optimizer, 1.0, 0.0, total_iters=10)
    AdaptiveBatchTrainer(
        model,
        AdaptiveBatches(DATA, 8),
        optimizer=optimizer,
        loss_fn=nn.CrossEntropyLoss(),
        max_updates=5,
        schedule=Schedule(scheduler, "update"),
        reporting=Reporting(show_progress=False),
    ).fit()
    assert scheduler.last_epoch == 5
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_counters_of_an_older_checkpoint_count_passes_as_epochs() -> None:
    """Epochs were passes then: with 2 of 3 completed, one is left, of which 40 were read."""
    course = Course(Extent(100, passes=3))
    course.load_state_dict({"examples": 240, "updates": 31, "epoch": 2, "place": 40, "settled": 31})
    assert not course.is_over
    course.count(60, data_ended=False)
    assert course.is_over
    assert course.counters.epoch == 3
