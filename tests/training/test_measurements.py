"""Measurements after an epoch: recorded, warned of, continued, and without a trace on training."""

import torch
from problems import bright_or_dark
from stopping import StopAfterEpoch
from torch import nn
from torch.nn.functional import cross_entropy

from hessianflow import AdaptiveBatchTrainer
from hessianflow.adversarial import RobustnessWatch
from hessianflow.data import DeviceBatches
from hessianflow.training import AfterEpoch, Reporting


def data() -> DeviceBatches:
    return bright_or_dark(24)


def train(measurements, **options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = [measurement(model) for measurement in measurements]
    trainer = AdaptiveBatchTrainer(
        model,
        data(),
        optimizer=optimizer,
        loss_fn=cross_entropy,
        epochs=3,
        after_epoch=AfterEpoch(measurements=made),
        **options,
    )
    return model, trainer


class Counter:
    """Counts its calls and warns at the second."""

    kind = "count"

    def __init__(self, _model) -> None:
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"calls": self.calls}, "that was the second" if self.calls == 2 else ""

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def test_rows_and_alarms_are_recorded_and_go_on_after_a_resume(tmp_path):
    stop = StopAfterEpoch(1)
    _, stop.trainer = train([Counter], run_dir=tmp_path / "run", reporting=Reporting(sinks=[stop]))
    assert stop.trainer.fit().summary["status"] == "preempted"
    history = train([Counter])[1].resume(tmp_path / "run")
    assert [(row["epoch"], row["calls"]) for row in history.of_kind("count")] == [
        (1, 1),
        (2, 2),
        (3, 3),
    ]
    (alarm,) = [row for row in history.of_kind("event") if row["event"] == "alarm"]
    assert (alarm["epoch"], alarm["message"]) == (2, "that was the second")


def test_watching_robustness_leaves_no_trace():
    batch = data().examples(torch.arange(8))
    watched, trainer = train([lambda model: RobustnessWatch(model, batch, 0.1, value_range=(0, 1))])
    history = trainer.fit()
    plain, trainer = train([])
    trainer.fit()
    assert len(history.of_kind("robustness")) == 3
    assert all(
        torch.equal(a, b)
        for a, b in zip(watched.state_dict().values(), plain.state_dict().values(), strict=True)
    )
