"""Where training begins and goes on: data that somebody looked at, interrupted runs, streams of
every kind."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from hessianflow import AdaptiveBatchTrainer, Decision, HessianFlowError, History
from hessianflow.adversarial import FGSM, ConcurrentAdversary
from hessianflow.control import AdaBatch, FixedBatch
from hessianflow.curvature import CurvatureProbe
from hessianflow.data import AdaptiveBatches, DeviceBatches
from hessianflow.training import AfterEpoch, Reporting, Schedule
from hessianflow.training.progressive import ProgressiveResize

N = 100
SOURCE = torch.Generator().manual_seed(1)
IMAGES, TARGETS = (
    torch.randn(N, 1, 4, 4, generator=SOURCE),
    torch.randint(3, (N,), generator=SOURCE),
)


class Foreign:
    """A stream of somebody else's, without a public place; may leave out a last batch that is not
    full."""

    def __init__(self, batch_size: int = 16, *, drop_last: bool = False) -> None:
        self.num_examples, self.batch_size, self.drop_last = N, batch_size, drop_last
        self._at = 0

    def set_batch_size(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Any]:
        while self._at < N and not (self.drop_last and N - self._at < self.batch_size):
            first, self._at = self._at, min(self._at + self.batch_size, N)
            yield IMAGES[first : self._at], TARGETS[first : self._at]
        self._at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self._at}

    def load_state_dict(self, state: Any) -> None:
        self._at = state["at"]


STREAMS: dict[str, Callable[[], Any]] = {
    "device": lambda: DeviceBatches(IMAGES, TARGETS, 16),
    "device, in order": lambda: DeviceBatches(IMAGES, TARGETS, 16, shuffle=False),
    "adaptive": lambda: AdaptiveBatches(TensorDataset(IMAGES, TARGETS), 16),
    "adaptive, in order": lambda: AdaptiveBatches(
        TensorDataset(IMAGES, TARGETS), 16, shuffle=False
    ),
    "adaptive, small chunks": lambda: AdaptiveBatches(
        TensorDataset(IMAGES, TARGETS), 16, chunk_size=5
    ),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 3))


def trainer(model: nn.Module, batches: Any, **options: Any) -> AdaptiveBatchTrainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings: dict[str, Any] = {
        "epochs": 4,
        "loss_fn": nn.CrossEntropyLoss(),
        "reporting": Reporting(show_progress=False),
    }
    settings["schedule"] = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    settings["controller"] = AdaBatch(16, 64, every_epochs=1)
    return AdaptiveBatchTrainer(
        model, batches, (IMAGES, TARGETS), optimizer=optimizer, **(settings | options)
    )


def comparable(history: History) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if "second" not in k}
        for row in history.records
        if row["kind"] != "event"
    ]


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def look(batches: Any, count: int = 1) -> None:
    for number, _ in enumerate(batches, start=1):
        if number == count:
            break


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize(
    "when", ["before building", "before training", "at every step", "at the ends of epochs"]
)
def test_a_look_at_the_data_changes_nothing(kind: str, when: str):
    """Weights, records and the scheduler end bit for bit as without it."""
    ours, theirs, batches = network(), network(), STREAMS[kind]()
    expected = trainer(theirs, STREAMS[kind]()).fit()
    if when == "before building":
        look(batches, 2)

    def transform(inputs, targets, progress):
        if when == "at every step" and progress.updates % 3 == 1:
            look(batches)
        return inputs, targets

    def before() -> None:
        if when == "at the ends of epochs":
            look(batches, 2)

    made = trainer(
        ours, batches, transform=transform, after_epoch=AfterEpoch(before_evaluation=before)
    )
    if when == "before training":
        look(batches)
    history = made.fit()
    assert_same(ours, theirs)
    assert comparable(history) == comparable(expected)
    assert [row["epoch"] for row in history.epochs] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", STREAMS)
def test_an_epoch_that_another_run_left_is_begun_anew(kind: str):
    """A cell of a notebook run again after Ctrl-C, with the same batches and another model."""
    batches = STREAMS[kind]()
    with pytest.raises(KeyboardInterrupt):
        trainer(network(), batches, transform=interrupting(5)).fit()
    batches.set_batch_size(16)
    ours, theirs = network(), network()
    history = trainer(ours, batches).fit()
    trainer(theirs, STREAMS[kind]()).fit()
    assert_same(ours, theirs)
    assert [row["examples"] for row in history.epochs] == [100, 200, 300, 400]


def interrupting(at: int) -> Any:
    calls: list[int] = []

    def transform(inputs, targets, progress):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return inputs, targets

    return transform


@pytest.mark.parametrize("kind", [*STREAMS, "foreign"])
@pytest.mark.parametrize("at", [1, 3, 9])
def test_an_interrupted_fit_goes_on(kind: str, at: int):
    """With the batch that was not trained; as if nothing had happened, bit for bit."""
    make = STREAMS.get(kind, Foreign)
    ours, theirs = network(), network()
    made = trainer(ours, make(), transform=interrupting(at))
    with pytest.raises(KeyboardInterrupt):
        made.fit()
    history = made.fit()
    expected = trainer(theirs, make()).fit()
    if kind != "foreign":  # that one lost a batch, and nobody can put it back
        assert_same(ours, theirs)
        assert comparable(history) == comparable(expected)
    assert [row["epoch"] for row in history.epochs] == [1, 2, 3, 4]


def test_an_error_in_the_step_keeps_the_batch_for_the_next_try():
    """Of a foreign stream, too: the batch was drawn, and waits in the queue."""
    ours, theirs = network(), network()
    seen: list[int] = []

    def fail(module, inputs):
        seen.append(1)
        if len(seen) == 5:
            raise RuntimeError("a device that was lost")

    ours.register_forward_pre_hook(
        lambda module, inputs: fail(module, inputs) if module.training else None
    )
    made = trainer(ours, Foreign())
    with pytest.raises(RuntimeError, match="a device that was lost"):
        made.fit()
    made.fit()
    trainer(theirs, Foreign()).fit()
    assert_same(ours, theirs)


class Flaky(Dataset[Any]):
    """Cannot be read once."""

    def __init__(self, at: int) -> None:
        self.reads, self.at = 0, at

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        if self.reads == self.at:
            raise OSError("stale file handle")
        return IMAGES[index], TARGETS[index]


@pytest.mark.parametrize("at", [10, 40, 150])
@pytest.mark.parametrize("chunk_size", [4, 32])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_error_of_the_data_skips_nothing(at: int, chunk_size: int, shuffle: bool):
    """Nor does it repeat anything, where the order is the stored one."""
    ours, theirs = network(), network()
    made = trainer(ours, AdaptiveBatches(Flaky(at), 16, chunk_size=chunk_size, shuffle=shuffle))
    with pytest.raises(OSError, match="stale file handle"):
        made.fit()
    made.fit()
    trainer(theirs, AdaptiveBatches(TensorDataset(IMAGES, TARGETS), 16, shuffle=shuffle)).fit()
    assert_same(ours, theirs)


def test_an_error_after_an_update_repeats_what_follows_it():
    ours, theirs = network(), network()
    failures = [True]

    def before() -> None:
        if failures and failures.pop():
            raise OSError("no space left on device")

    made = trainer(ours, STREAMS["device"](), after_epoch=AfterEpoch(before_evaluation=before))
    with pytest.raises(OSError, match="no space left"):
        made.fit()
    history = made.fit()
    expected = trainer(theirs, STREAMS["device"]()).fit()
    assert_same(ours, theirs)
    assert [row["epoch"] for row in history.epochs] == [1, 2, 3, 4]
    assert [row["lr"] for row in history.epochs] == [row["lr"] for row in expected.epochs]


class Failing:
    """A sink, a measurement and a controller in one: counts what it is asked, and fails once at a
    place of choice."""

    kind = "counted"

    def __init__(self, place: str) -> None:
        self.place: str | None = place
        self.controller = AdaBatch(16, 64, every_epochs=1)
        self.decision, self.needs = self.controller.decision, self.controller.needs
        self.asked: list[int] = []

    def fail(self, place: str) -> None:
        if self.place == place:
            self.place = None
            raise OSError("no space left on device")

    def write(self, row: dict[str, Any]) -> None:
        self.fail(f"row {row['kind']}")

    def close(self) -> None:
        pass

    def __call__(self) -> tuple[dict[str, float], str]:
        self.fail("measurement")
        return {"figure": 1.0}, ""

    def is_due(self, progress: Any) -> bool:
        return self.controller.is_due(progress)

    def update(self, progress: Any, reading: Any = None, signals: Any = ()) -> Decision:
        self.asked.append(progress.updates)
        self.decision = self.controller.update(progress, reading, dict(signals))
        return self.decision

    def state_dict(self) -> dict[str, Any]:
        return self.controller.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.controller.load_state_dict(state)


@pytest.mark.parametrize(
    "place",
    [
        "before",
        "after",
        "measurement",
        "row epoch",
        "row curvature",
        "row batch",
        "row counted",
        "none",
    ],
)
def test_nothing_that_follows_an_update_is_done_twice(place: str):
    """Asked twice, the controller would double the batch twice; rows and steps of the schedule
    would be twofold."""
    failing, calm = Failing(place), Failing("none")

    def run(parts: Failing, model: nn.Module) -> AdaptiveBatchTrainer:
        return trainer(
            model,
            STREAMS["device"](),
            controller=parts,
            probe=CurvatureProbe(model, nn.CrossEntropyLoss(), (IMAGES[:16], TARGETS[:16])),
            after_epoch=AfterEpoch(
                measurements=[Constant(), parts],
                before_evaluation=lambda: parts.fail("before"),
                after_evaluation=lambda: parts.fail("after"),
            ),
            reporting=Reporting(sinks=[parts]),
        )

    ours, theirs = network(), network()
    made, undisturbed = run(failing, ours), run(calm, theirs)
    if place != "none":
        with pytest.raises(OSError, match="no space left"):
            made.fit()
    history, expected = made.fit(), undisturbed.fit()
    assert_same(ours, theirs)
    assert failing.asked == calm.asked
    assert comparable(history) == comparable(expected)


class Constant:
    kind = "first"

    def __call__(self) -> tuple[dict[str, float], str]:
        return {"figure": 0.0}, ""


def test_a_second_fit_says_that_the_run_is_over():
    made = trainer(network(), STREAMS["device"]())
    made.fit()
    with pytest.raises(
        HessianFlowError, match="this run is over, after 4 epochs and 15 updates: train on"
    ):
        made.fit()
    trainer(made.model, made.train_data).fit()  # with the same model and data


def test_a_run_directory_is_continued_by_resume(tmp_path):
    ours, theirs = network(), network()
    made = trainer(ours, STREAMS["adaptive"](), transform=interrupting(9), run_dir=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        made.fit()
    with pytest.raises(
        HessianFlowError, match=r"already holds a run: .* \(from Python: trainer.resume\)"
    ):
        made.fit()
    history = made.resume(tmp_path / "run")
    expected = trainer(theirs, STREAMS["adaptive"]()).fit()
    assert_same(ours, theirs)
    assert comparable(history) == comparable(expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("stop_at", [2, 7, 12])
def test_streams_of_every_kind_are_resumed_exactly(tmp_path, kind: str, stop_at: int):
    """After two batches, at the end of the first epoch of 7, within the second of larger
    batches."""
    ours, theirs = network(), network()

    def watch(inputs, targets, progress):
        if progress.updates + 1 == stop_at:
            first.request_stop()
        return inputs, targets

    first = trainer(network(), STREAMS[kind](), transform=watch, run_dir=tmp_path / "run")
    assert first.fit().summary["status"] == "preempted"
    history = trainer(ours, STREAMS[kind]()).resume(tmp_path / "run")
    expected = trainer(theirs, STREAMS[kind]()).fit()
    assert_same(ours, theirs)
    assert comparable(history) == comparable(expected)


@pytest.mark.parametrize("kind", STREAMS)
def test_stretches_of_updates_are_one_run(kind: str):
    """As an elastic run trains: a few updates at a time."""
    ours, theirs = network(), network()
    made = trainer(ours, STREAMS[kind]())
    made.begin()
    for updates in range(2, 100, 3):
        made.run_until(updates)
    expected = trainer(theirs, STREAMS[kind]()).fit()
    assert_same(ours, theirs)
    assert made.progress.updates == expected.summary["updates"]


@pytest.mark.parametrize("looked", [False, True])
def test_data_that_leave_out_the_rest_end_their_epochs_all_the_same(looked: bool):
    """100 examples in batches of 16, 32 and 64 without a rest: 96, 96, 64 and 64 of them an
    epoch."""
    batches = Foreign(drop_last=True)
    if looked:
        look(batches)
    history = trainer(network(), batches).fit()
    # nobody can tell that this stream stands inside an epoch: what is left of it is one
    first = 80 if looked else 96
    assert [row["epoch"] for row in history.epochs] == [1, 2, 3, 4]
    assert [row["examples"] for row in history.epochs] == [
        first,
        first + 96,
        first + 160,
        first + 224,
    ]
    assert [row["batch_size"] for row in history.epochs] == [16, 32, 64, 64]
    assert history.summary["status"] == "finished"


@pytest.mark.parametrize("staleness", [1, 3])
def test_batches_drawn_ahead_end_their_epochs_with_the_data(staleness: int):
    """Twins are made steps before their use, also across the ends of epochs."""
    adversary = ConcurrentAdversary(FGSM(0.1, value_range=None), staleness=staleness)
    options: dict[str, Any] = {
        "controller": FixedBatch(16),
        "adversary": adversary,
        "epochs": 3,
    }
    history = trainer(network(), Foreign(drop_last=True), **options).fit()
    assert [row["examples"] for row in history.epochs] == [96, 192, 288]


def test_data_without_a_batch_are_refused():
    class Empty(Foreign):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(
        HessianFlowError, match="train_data gave no batch in epoch 1: pass data with at least"
    ):
        trainer(network(), Empty()).fit()


def test_resolutions_follow_epochs_after_a_look():
    """Stages are counted in epochs of the run: two of 2 pixels, then full resolution."""
    from hessianflow.control import Level

    batches, seen = STREAMS["device"](), []
    look(batches, 3)
    model = network()
    resize = ProgressiveResize(model, lambda epoch: Level(2 if epoch < 2 else 4, 16, 0.0))

    def transform(inputs, targets, progress):
        made = resize(inputs, targets, progress)
        seen.append(made[0].shape[-1])
        return made

    trainer(model, batches, transform=transform, controller=None, epochs=3).fit()
    assert seen == [2] * 14 + [4] * 7


class Early:
    """Stops a run from its records."""

    def __init__(self, kind: str, epoch: int) -> None:
        self.kind, self.epoch = kind, epoch

    def write(self, row: Any) -> None:
        if row["kind"] == self.kind and row["epoch"] == self.epoch:
            self.trainer.request_stop()

    def close(self) -> None:
        pass


@pytest.mark.parametrize("kind", ["epoch", "batch"])
def test_stopped_by_a_sink_at_the_end_of_an_epoch(tmp_path, kind: str):
    """The weights are those of that epoch, and the run can be resumed."""
    ours, theirs, sink = network(), network(), Early(kind, 2)
    sink.trainer = trainer(
        ours, STREAMS["device"](), reporting=Reporting(sinks=[sink]), run_dir=tmp_path / "run"
    )
    history = sink.trainer.fit()
    trainer(theirs, STREAMS["device"](), epochs=2, schedule=Schedule(None)).fit()
    theirs = network()
    made = trainer(theirs, STREAMS["device"]())
    made.begin()
    made.run_until(7 + 4)
    assert (history.summary["status"], history.summary["epochs"], history.summary["updates"]) == (
        "preempted",
        2,
        11,
    )
    assert_same(ours, theirs)
    again = network()
    resumed = trainer(again, STREAMS["device"]()).resume(tmp_path / "run")
    whole = network()
    expected = trainer(whole, STREAMS["device"]()).fit()
    assert_same(again, whole)
    assert comparable(resumed) == comparable(expected)


def test_without_a_controller_the_batch_is_that_of_the_data():
    assert trainer(network(), STREAMS["device"](), controller=None).decision == Decision(16)
