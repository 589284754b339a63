"""TensorBoard files read back by TensorBoard's own reader; log lines as the logging module delivers
them."""

import builtins
import logging
from pathlib import Path
from typing import Any

import pytest

from hessianflow.interfaces import HessianFlowError
from hessianflow.runs import LogSink, TensorBoardSink

EPOCH: dict[str, Any] = {
    "kind": "epoch",
    "epoch": 1,
    "examples": 50,
    "updates": 7,
    "batch_size": 8,
    "lr": 0.1,
    "adversarial_share": 0.2,
    "train_loss": 0.5,
    "train_accuracy": None,
    "eval_loss": 0.25,
    "eval_accuracy": 0.875,
    "images_per_second": 123.4,
}
BATCH = {
    "kind": "batch",
    "epoch": 1,
    "examples": 50,
    "updates": 7,
    "from": 8,
    "to": 16,
    "lr_factor": 2.0,
    "adversarial_share": 0.1,
    "reason": "eigenvalue fell",
}


def read(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[str]]]:
    """Scalars as (step, value) and texts, by tag."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(folder)).Reload()
    scalars = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    texts = {
        tag: [tensor_util.make_ndarray(e.tensor_proto).item().decode() for e in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    return scalars, texts


def test_every_number_is_a_scalar_over_examples(tmp_path: Path):
    pytest.importorskip("tensorboard")
    sink = TensorBoardSink(tmp_path / "tb")
    assert not (tmp_path / "tb").exists(), "a run directory must be empty when the run starts"
    sink.write(EPOCH)
    sink.write(BATCH)
    sink.write(
        {
            "kind": "event",
            "epoch": 1,
            "examples": 50,
            "updates": 7,
            "event": "preempted",
            "message": "stopped",
        }
    )
    sink.close()
    scalars, texts = read(tmp_path / "tb")
    assert scalars["epoch/eval_accuracy"] == [(50, 0.875)]
    assert scalars["batch/to"] == [(50, 16.0)]
    assert set(scalars) == {
        *(
            f"epoch/{n}"
            for n in (
                "batch_size",
                "lr",
                "adversarial_share",
                "train_loss",
                "eval_loss",
                "eval_accuracy",
            )
        ),
        "epoch/images_per_second",
        *(f"batch/{n}" for n in ("from", "to", "lr_factor", "adversarial_share")),
    }
    assert texts["batch/reason/text_summary"] == ["eigenvalue fell"]
    assert texts["event/message/text_summary"] == ["stopped"]


@pytest.mark.parametrize("first", ["epoch", "event"])
def test_rows_made_again_after_a_resume_are_shown_once(tmp_path: Path, first: str):
    """Killed after epoch 3, resumed from epoch 1; an event at the checkpoint itself hides nothing
    made before it."""
    pytest.importorskip("tensorboard")
    sink = TensorBoardSink(tmp_path)
    for epoch in (1, 2, 3):
        sink.write({**EPOCH, "epoch": epoch, "examples": 50 * epoch, "train_loss": float(epoch)})
    sink.close()
    again = TensorBoardSink(tmp_path)
    if first == "event":
        again.write(
            {
                "kind": "event",
                "epoch": 1,
                "examples": 50,
                "updates": 7,
                "event": "fallback",
                "message": "x",
            }
        )
    again.write({**EPOCH, "epoch": 2, "examples": 100, "train_loss": 20.0})
    again.close()
    assert read(tmp_path)[0]["epoch/train_loss"] == [(50, 1.0), (100, 20.0)]


def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if "tensorboard" in name:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(HessianFlowError, match=r"pip install 'hessianflow\[tensorboard\]'"):
        TensorBoardSink(tmp_path)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG, "hessianflow")
    return lambda: [(r.levelname, r.getMessage()) for r in caplog.records]


def test_one_line_per_record(lines):
    sink = LogSink()
    reading = {
        "kind": "curvature",
        "epoch": 1,
        "examples": 50,
        "eigenvalue": 12.5,
        "converged": True,
        "matvecs": 9,
    }
    event = {"kind": "event", "epoch": 1, "examples": 50, "updates": 7, "message": "because"}
    for record in (
        EPOCH,
        BATCH,
        {**BATCH, "to": 8, "lr_factor": 0.5},
        reading,
        {**reading, "matrix": "Hessian"},
        {**reading, "matrix": "preconditioned Hessian"},
        {**reading, "eigenvalue": None},
        {"kind": "signals", "epoch": 1, "examples": 50, "noise_scale": 3.0},
        {**event, "event": "fallback"},
        {**event, "event": "preempted"},
    ):
        sink.write(record)
    sink.close()
    assert lines() == [
        (
            "INFO",
            (
                "epoch 1: batch 8, lr 0.1, train loss 0.5, test loss 0.25, test accuracy 0.875, 123"
                " images/s"
            ),
        ),
        ("INFO", "epoch 1: batch 8 -> 16, lr factor 2, adversarial share 0.1: eigenvalue fell"),
        ("INFO", "epoch 1: batch 8, lr factor 0.5, adversarial share 0.1: eigenvalue fell"),
        ("DEBUG", "epoch 1: eigenvalue 12.5 (converged, 9 products)"),
        ("DEBUG", "epoch 1: eigenvalue 12.5 (converged, 9 products)"),
        (
            "DEBUG",
            "epoch 1: eigenvalue 12.5 of the preconditioned Hessian (converged, 9 products)",
        ),
        ("DEBUG", "epoch 1: no finite eigenvalue"),
        ("WARNING", "fallback: because"),
        ("INFO", "preempted: because"),
    ]
