"""Sinks for Weights & Biases and MLflow, which run offline here."""

import builtins
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peers import library

from hessianflow.interfaces import HessianFlowError
from hessianflow.runs import MLflowSink, Recorder, WandbSink
from hessianflow.runs.trackers import figures, flat

CURVATURE: dict[str, Any] = {
    "kind": "curvature",
    "epoch": 0,
    "examples": 40,
    "updates": 5,
    "eigenvalue": 2.5,
    "converged": True,
    "norm_mode": "eval",
    "eigenvalues": [2.5, 1.5],
    "note": None,
}
BATCH = {
    "kind": "batch",
    "epoch": 1,
    "examples": 80,
    "updates": 10,
    "from": 8,
    "to": 16,
    "reason": "eigenvalue fell",
}
CONFIG = {"seed": 3, "trainer": {"optimizer": "SGD", "lr": 0.1}}


def test_numbers_and_texts_are_separated() -> None:
    numbers, texts = figures(CURVATURE)
    assert numbers == {
        "curvature/eigenvalue": 2.5,
        "curvature/converged": 1.0,
        "curvature/eigenvalues_1": 2.5,
        "curvature/eigenvalues_2": 1.5,
    }
    assert texts == {"curvature/norm_mode": "eval"}


def test_nested_settings_get_dotted_names() -> None:
    assert flat(CONFIG) == {"seed": 3, "trainer.optimizer": "SGD", "trainer.lr": 0.1}


def written(sink: Any) -> None:
    recorder = Recorder(None, [sink])
    recorder.start(CONFIG)
    recorder.write(CURVATURE)
    recorder.write(BATCH)
    recorder.close()


def test_wandb_gets_figures_over_examples_text_and_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights & Biases has no reader without its server, so its calls are recorded instead."""
    seen: dict[str, Any] = {"logs": [], "metrics": [], "summary": {}}
    run = SimpleNamespace(
        log=seen["logs"].append,
        define_metric=lambda *names, **options: seen["metrics"].append((names, options)),
        summary=seen["summary"],
        finish=lambda: seen.update(finished=True),
    )

    def init(**options: Any) -> Any:
        seen["options"] = options
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    sink = WandbSink(project="p", config={"mine": 1})
    assert "options" not in seen  # nothing begins before the first record
    written(sink)
    assert seen["options"]["project"] == "p"
    assert seen["options"]["config"]["trainer"] == CONFIG["trainer"]
    assert seen["options"]["config"]["mine"] == 1
    assert seen["metrics"] == [(("examples",), {}), (("*",), {"step_metric": "examples"})]
    assert seen["logs"][0]["curvature/eigenvalue"] == 2.5
    assert [row["examples"] for row in seen["logs"]] == [40, 80]
    assert seen["summary"]["batch/reason"] == "eigenvalue fell"
    assert not any(isinstance(value, str) for row in seen["logs"] for value in row.values())
    assert seen["finished"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_sink_works_with_wandb_itself_offline(tmp_path: Path) -> None:
    library("wandb")
    written(WandbSink(mode="offline", dir=str(tmp_path), project="p"))
    [log] = tmp_path.rglob("*.wandb")
    names = (b"curvature/eigenvalue", b"eigenvalue fell", b"optimizer")
    deadline = time.monotonic() + 60  # A process of its own writes the file.
    while not all(name in log.read_bytes() for name in names) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [name for name in names if name not in log.read_bytes()] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_figures_over_examples_text_and_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the small package has no database
    mlflow = library("mlflow")
    uri = (tmp_path / "runs").as_uri()
    sink = MLflowSink("mine", name="one", tracking_uri=uri)
    written(sink)
    client = mlflow.MlflowClient(uri)
    run = client.get_run(sink.run_id)
    assert run.info.run_name == "one"
    assert run.info.status == "FINISHED"
    assert run.data.params["trainer.optimizer"] == "SGD"
    assert run.data.tags["batch/reason"] == "eigenvalue fell"
    history = client.get_metric_history(sink.run_id, "batch/to")
    assert [(metric.step, metric.value) for metric in history] == [(80, 16.0)]
    assert mlflow.active_run() is None
    again = MLflowSink(tracking_uri=uri, run_id=sink.run_id)
    written(again)
    assert len(client.get_metric_history(sink.run_id, "batch/to")) == 2


@pytest.mark.parametrize(("sink", "package"), [(WandbSink, "wandb"), (MLflowSink, "mlflow")])
def test_an_absent_package_is_named_with_its_extra(
    sink: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(HessianFlowError, match=rf"pip install 'hessianflow\[{package}\]'$"):
        sink()
