"""The command `plan`, which predicts time and cost of a run on many workers.

Other kinds of plan are subcommands of this one.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import Namespace

from hessianflow.bounds import MOST, Range
from hessianflow.commands import plan_dual_batch
from hessianflow.commands.parser import add_command, path
from hessianflow.commands.runs import (
    add_code,
    printable,
    require_named_code,
    require_settings,
    writing_to,
)
from hessianflow.commands.settings import add_settings
from hessianflow.config import TrainConfig, option
from hessianflow.interfaces import HessianFlowError

if TYPE_CHECKING:
    from hessianflow.planning import PerformanceModel, Phase, Prediction
    from hessianflow.planning.measure import Measured, PlanBasis

LARGE_RESIDUAL = 0.2
"""Share by which step times may lie off their line before they are called doubtful. This default is
our choice."""
DEFAULTS = {
    "bandwidth": (1.25e9, "default, the line rate of 10-gigabit Ethernet (IEEE 802.3ae)"),
    "latency": (5e-5, "default, our choice: a round figure for TCP between two machines"),
}
"""Default figures of the all-reduce, in bytes per second and in seconds, and their origin."""

SCHEDULE = (
    *("data", "train_examples", "model", "controller", "optimizer"),
    *("batch_size", "max_batch_size", "epochs"),
)
"""Settings of the run that is planned."""
HERE = ("data_dir", "microbatch_size", "precision", "channels_last", "device", "threads")
"""Settings of the measurement."""
FIGURES = {
    "slope": Range(0, MOST, above=True),
    "intercept": Range(0, MOST),
    "update_seconds": Range(0, MOST),
    "gradient_bytes": Range(0, 1e15, above=True),
    "bandwidth": Range(0, 1e15, above=True),
    "latency": Range(0, MOST),
    "price": Range(0, MOST),
}
"""Bounds of the options that are figures."""
_OPEN: dict[str, tuple[Any, str]] = {
    "run": (path, "run directory with the settings and batches to plan for"),
    "measured": (path, "plan.json of another plan, with step times; default: measured here"),
    "slope": (float | None, "seconds per example in forward and backward pass; default: measured"),
    "intercept": (float | None, "seconds per microbatch besides those; default: measured"),
    "update_seconds": (float | None, "seconds of an optimizer step; default: measured"),
    "gradient_bytes": (int | None, "bytes of all gradients; default: float32 of the model"),
    "bandwidth": (float | None, "bytes per second between two workers; default: 1.25e9"),
    "latency": (float | None, "seconds per message between two workers; default: 5e-5"),
    "out": (path, "folder of the plan; default: plan, in the run directory if there is one"),
}
"""Type and help of the options that are null by default."""


@dataclass(frozen=True)
class Basis:
    """The figures that a plan is made from.

    Attributes:
        model: Performance model.
        measured: Measurement of one worker.
        phases: Batches of the run.
        sources: A line about the origin of each figure.
    """

    model: "PerformanceModel"
    measured: "Measured"
    phases: "Sequence[Phase]"
    sources: dict[str, str]


def add(commands: Any) -> dict[str, Callable[[Namespace], int]]:
    """Add the parsers, and return the function of the command."""
    about = "predict time, efficiency and cost of a run on many workers"
    plan = add_command(commands, "plan", about)
    about = "numbers of workers: 1..1024 doubles from 1 to 1024, and 1,2,6 is a list"
    plan.add_option("--workers", str, "1..1024", about)
    for name, (hint, text) in _OPEN.items():
        plan.add_open(option(name), hint, text)
    about = "fixed holds all workers throughout, elastic as many as get a full microbatch each"
    plan.add_option("--membership", Literal["fixed", "elastic"], "fixed", about)
    plan.add_option("--price", float, 0.0, "price of a worker for an hour, in any currency")
    add_settings(plan, (*SCHEDULE, *HERE))
    add_code(plan)
    kinds = plan.add_subcommands(required=False, title="other kinds of plans", metavar="KIND")
    plan_dual_batch.add(kinds)
    return {"plan": _plan}


def _plan(arguments: Namespace) -> int:
    if arguments.subcommand is not None:
        return plan_dual_batch.run(arguments[arguments.subcommand])
    from hessianflow.planning import predict
    from hessianflow.planning.measure import worker_counts

    _check(arguments)
    counts = worker_counts(arguments.workers)
    run = _run(arguments)
    basis = _basis(arguments, run)
    predictions = predict(basis.model, basis.phases, counts, membership=arguments.membership)
    for name, text in basis.sources.items():
        print(f"{name:<12}{printable(text)}")
    print(_table(predictions, arguments.price))
    print(_verdict(predictions))
    folder = Path(arguments.out or Path(arguments.run or "") / "plan")
    _write(folder, arguments, basis, predictions)
    return 0


def _check(arguments: Namespace) -> None:
    for name, allowed in FIGURES.items():
        if arguments[name] is not None:
            allowed.check(option(name), arguments[name])
    if (arguments.slope is None) != (arguments.intercept is None):
        raise HessianFlowError("--slope and --intercept belong together: give both, or neither")
    if arguments.slope is not None and arguments.measured is not None:
        raise HessianFlowError("--measured and --slope both give step times: leave one out")


def _said(value: Any) -> Any:
    """Return a setting as it was typed; of a method this is its name."""
    if isinstance(value, dict):
        return value["name"]
    return value


def _run(arguments: Namespace) -> "PlanBasis":
    from hessianflow.parts import load_config, on_this_machine, prepare
    from hessianflow.planning.measure import PlanBasis
    from hessianflow.runs import History

    changed = arguments.given.settings(arguments)
    if arguments.run is None:
        config = prepare(TrainConfig(**changed))
        arguments.given.check(config)
        return PlanBasis(config)
    for name in changed:
        if name in SCHEDULE and name != "model":
            raise HessianFlowError(
                f"{option(name)} {_said(changed[name])}: --run {arguments.run} sets that, leave one"
                " out"
            )
    require_settings(arguments.run, "plan", "hf.planning.predict")
    require_named_code(arguments.run, arguments)
    config = on_this_machine(replace(load_config(arguments.run), **changed))
    return PlanBasis(config, History.load(arguments.run))


def _basis(arguments: Namespace, run: "PlanBasis") -> Basis:
    from hessianflow.planning import AllReduceTime, PerformanceModel
    from hessianflow.planning.measure import planned_phases, recorded_phases

    config = run.config
    microbatch = config.microbatch_size
    microbatch_source = "as given"
    if not isinstance(microbatch, int):
        microbatch = config.batch_size
        microbatch_source = "the batch size at the start"
    if run.history is None:
        phases, phases_source = planned_phases(run)
    else:
        phases = recorded_phases(run.history, config.counted_epochs)
        phases_source = f"recorded in {arguments.run}"
    measured = _measured(arguments, run, microbatch)
    if arguments.update_seconds is not None:
        measured = replace(measured, update_seconds=arguments.update_seconds)
    size = arguments.gradient_bytes or measured.gradient_bytes or run.gradient_bytes
    bandwidth, bandwidth_source = _figure(arguments, "bandwidth")
    latency, latency_source = _figure(arguments, "latency")
    examples = sum(phase.examples for phase in phases)
    sources = {
        **_step_sources(measured),
        "gradients": f"{size / 1e6:.3g} MB",
        "bandwidth": f"{bandwidth / 1e9:.3g} GB/s: {bandwidth_source}",
        "latency": f"{1e6 * latency:.3g} us: {latency_source}",
        "microbatch": f"at most {microbatch} examples: {microbatch_source}",
        "batches": f"{_sizes(phases)} over {examples} examples: {phases_source}",
        "left out": (
            "adversary, curvature, evaluation, data; no sum is hidden behind a backward pass"
        ),
    }
    line = measured.step_time
    if measured.sizes and (line.residual > LARGE_RESIDUAL or line.intercept == 0):
        sources["doubtful"] = (
            "the step times make no clean line (a busy machine?): measure again, or give both"
            " --slope and --intercept"
        )
    model = PerformanceModel(
        line,
        AllReduceTime(latency, bandwidth),
        size,
        microbatch,
        measured.update_seconds or 0.0,
        arguments.price,
        "; ".join(f"{name}: {text}" for name, text in sources.items()),
    )
    return Basis(model, replace(measured, gradient_bytes=size), phases, sources)


def _figure(arguments: Namespace, name: str) -> tuple[float, str]:
    """Return a figure of the all-reduce, and its origin."""
    if arguments[name] is not None:
        return arguments[name], "as given"
    return DEFAULTS[name]


def _step_sources(measured: "Measured") -> dict[str, str]:
    """Return the lines about the time of a step and of an update."""
    line = measured.step_time
    step = f"{1e3 * line.intercept:.3g} ms + {1e3 * line.slope:.3g} ms an example: "
    step += measured.source
    if measured.sizes:
        step += (
            f"; {len(measured.sizes)} sizes up to {max(measured.sizes)}, at most"
            f" {line.residual:.0%} off the line"
        )
    update = "not counted: unknown"
    if measured.update_seconds is not None:
        update = f"{1e3 * measured.update_seconds:.3g} ms"
    return {"step": step, "update": update}


def _measured(arguments: Namespace, run: "PlanBasis", microbatch: int) -> "Measured":
    from hessianflow.control import TimeModel
    from hessianflow.planning.measure import Measured, measure, read_measured

    if arguments.slope is not None:
        return Measured(TimeModel(arguments.slope, arguments.intercept), source="as given")
    if arguments.measured is not None:
        return read_measured(arguments.measured)
    return measure(run, microbatch)


def _sizes(phases: "Sequence[Phase]") -> str:
    from hessianflow.planning.measure import merged

    sizes = [str(phase.batch_size) for phase in merged(phases)]
    if len(sizes) > 6:
        sizes[3:-2] = ["..."]
    return " -> ".join(sizes)


def _table(predictions: "Sequence[Prediction]", price: float) -> str:
    lines = [
        f"{'workers':>8}{'time':>12}{'speed-up':>10}{'efficiency':>12}{'all-reduce':>12}"
        f"{'updates':>9}{'worker hours':>14}"
    ]
    lines += [
        f"{p.workers:>8}{duration(p.seconds):>12}{p.speedup:>10.4g}{p.efficiency:>12.1%}"
        f"{p.communication:>12.1%}{p.updates:>9}{p.worker_seconds / 3600:>14.4g}"
        for p in predictions
    ]
    if price:
        costs = [f"{'cost':>11}", *(f"{p.cost:>11.4g}" for p in predictions)]
        lines = [line + cost for line, cost in zip(lines, costs, strict=True)]
    return "\n".join(lines)


def _verdict(predictions: "Sequence[Prediction]") -> str:
    fastest = min(predictions, key=lambda p: p.seconds)
    verdict = f"fastest on {fastest.workers}: {duration(fastest.seconds)}"
    used = [p.workers for p in predictions if p.efficiency >= 0.5]
    if used:
        verdict += f"; at least half of every worker's time is used up to {max(used)}"
    return verdict


def duration(seconds: float) -> str:
    """Return a time in its largest unit of which there are at least two."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.4g} {unit}"
    return f"{1e3 * seconds:.4g} ms"


def _write(
    folder: Path, arguments: Namespace, basis: Basis, predictions: "Sequence[Prediction]"
) -> None:
    from hessianflow import plots
    from hessianflow.planning.measure import as_json, merged
    from hessianflow.runs.files import write_json

    plan = {
        "sources": basis.sources,
        "measured": as_json(basis.measured),
        "all_reduce": asdict(basis.model.all_reduce),
        "microbatch_size": basis.model.microbatch_size,
        "membership": arguments.membership,
        "price": arguments.price,
        "phases": [asdict(phase) for phase in merged(basis.phases)],
        "predictions": [asdict(prediction) for prediction in predictions],
    }
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "plan.json", plan)
        plots.scaling(plan, path=folder / "plan.png")
    print(f"  {printable(folder / 'plan.json')}\n  {printable(folder / 'plan.png')}")
