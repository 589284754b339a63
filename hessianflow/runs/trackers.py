"""Sinks that send a run's records to experiment trackers: Weights & Biases and MLflow.

Both plot figures over training examples, so that runs of different batch sizes can be compared.
Names are KIND/FIELD, such as "epoch/eval_accuracy", "curvature/eigenvalue" and "batch/to". Text
(reasons, messages) cannot be a point of a curve, so the newest text of each name is kept beside the
run. The settings of the run are passed on when it starts.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from hessianflow.interfaces import HessianFlowError

PLACE = ("kind", "epoch", "examples", "updates")
"""Fields of a record that say where in the run it was made; they are not figures."""
STEP = "examples"
LONGEST_TEXT = 500
"""Largest number of characters of a text in MLflow, because older servers store no more."""


class WandbSink:
    """A sink that writes to a run of Weights & Biases.

    The run there begins with the first record, so the sink can be made on every rank. Resume a run
    with `id=` and `resume="allow"`.

    Args:
        options: Options of `wandb.init`, such as project, name, mode ("offline") and dir.

    Raises:
        HessianFlowError: The package wandb is not installed.
    """

    def __init__(self, **options: Any) -> None:
        try:
            import wandb
        except ImportError:
            raise _absent("WandbSink", "wandb") from None
        self._init = wandb.init
        self._options = options
        self._config: Mapping[str, Any] = {}
        self._run: Any = None

    def configure(self, config: Mapping[str, Any]) -> None:
        """Take the settings of the run, which go to the config of the run there."""
        self._config = config

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record, at its number of training examples."""
        if self._run is None:
            config = {**self._config, **self._options.get("config", {})}
            self._run = self._init(**{**self._options, "config": config})
            self._run.define_metric(STEP)
            self._run.define_metric("*", step_metric=STEP)
        numbers, texts = figures(record)
        self._run.log({**numbers, STEP: record["examples"], "epoch": record["epoch"]})
        for name, text in texts.items():
            self._run.summary[name] = text

    def close(self) -> None:
        """Finish the run, if it has begun."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class MLflowSink:
    """A sink that writes to a run of MLflow.

    It uses MLflow's client only, so it does not change the active run. The run there begins with
    the first record, so the sink can be made on every rank.

    Args:
        experiment: Name of the experiment, which is created if it does not exist.
        name: Name of the run; None lets MLflow choose.
        tracking_uri: Address of the server or folder; None for MLflow's own choice.
        run_id: Identifier of an earlier run to continue; None begins a new run.

    Raises:
        HessianFlowError: The package mlflow (or mlflow-skinny) is not installed.
    """

    def __init__(
        self,
        experiment: str = "hessianflow",
        *,
        name: str | None = None,
        tracking_uri: str | None = None,
        run_id: str | None = None,
    ) -> None:
        try:
            from mlflow import MlflowClient, entities
        except ImportError:
            raise _absent("MLflowSink", "mlflow") from None
        self._entities = entities
        self._make: Callable[[str | None], Any] = MlflowClient
        self._uri = tracking_uri
        self._client: Any = None
        self._experiment = experiment
        self._name = name
        self.run_id = run_id
        self._config: Mapping[str, Any] = {}

    def configure(self, config: Mapping[str, Any]) -> None:
        """Take the settings of the run, which become parameters with dotted names."""
        self._config = config

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record; its step is the number of training examples."""
        if self._client is None:
            self._begin()
        numbers, texts = figures(record)
        now = int(1000 * time.time())
        metrics = [
            self._entities.Metric(name, value, now, record["examples"])
            for name, value in {**numbers, "epoch": float(record["epoch"])}.items()
        ]
        tags = [self._entities.RunTag(name, text[:LONGEST_TEXT]) for name, text in texts.items()]
        self._client.log_batch(self.run_id, metrics=metrics, tags=tags)

    def close(self) -> None:
        """End the run, if it has begun."""
        if self._client is not None:
            self._client.set_terminated(self.run_id)
            self._client = None

    def _begin(self) -> None:
        self._client = client = self._make(self._uri)
        if self.run_id is None:
            known = client.get_experiment_by_name(self._experiment)
            if known is None:
                number = client.create_experiment(self._experiment)
            else:
                number = known.experiment_id
            self.run_id = client.create_run(number, run_name=self._name).info.run_id
        else:
            client.set_terminated(self.run_id, "RUNNING")
        there = client.get_run(self.run_id).data.params
        for name, value in flat(self._config).items():
            if name not in there:  # a parameter cannot be changed
                client.log_param(self.run_id, name, str(value)[:LONGEST_TEXT])


def figures(record: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the numbers and the texts of a record by KIND/FIELD, without the fields in PLACE.

    Truth values become 0 and 1, and each entry of a list of numbers becomes a separate figure.
    """
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    for name, value in record.items():
        full = f"{record['kind']}/{name}"
        if name in PLACE or value is None:
            continue
        if isinstance(value, (bool, int, float)):
            numbers[full] = float(value)
        elif isinstance(value, (list, tuple)):
            kept = [each for each in value if isinstance(each, (int, float))]
            numbers |= {f"{full}_{place}": float(each) for place, each in enumerate(kept, 1)}
        else:
            texts[full] = str(value)
    return numbers, texts


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested settings, by dotted names."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values


def _absent(sink: str, package: str) -> HessianFlowError:
    return HessianFlowError(
        f"{sink} needs the package {package}: pip install 'hessianflow[{package}]'"
    )
