"""`hessianflow plan`: what a run would take on many workers, before anybody rents them.

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
from hessianflow.commands.runs import printable, require_named_code, require_settings, writing_to
from hessianflow.commands.settings import add_settings
from hessianflow.config import TrainConfig, option
from hessianflow.interfaces import HessianFlowError

if TYPE_CHECKING:
    from hessianflow.planning import PerformanceModel, Phase, Prediction
    from hessianflow.planning.measure import Measured, Run

LARGE_RESIDUAL = 0.2
"""Step times that lie farther off their line than this share are called doubtful. Ours."""
BANDWIDTH, LATENCY = 1.25e9, 5e-5
ORIGINS = {
    "bandwidth": "default, the line rate of 10-gigabit Ethernet (IEEE 802.3ae)",
    "latency": "default, ours: a round figure for TCP between two machines",
}
"""Where the default figures of the all-reduce come from."""

SCHEDULE = (
    "data",
    "train_examples",
    "model",
    "controller",
    "optimizer",
    "batch_size",
    "max_batch_size",
    "epochs",
)
HERE = ("data_dir", "microbatch_size", "precision", "channels_last", "device", "threads")
"""Settings that say what is trained, and settings that say how it is measured."""
FIGURES = {
    "slope": Range(0, MOST, above=True),
    "intercept": Range(0, MOST),
    "update_seconds": Range(0, MOST),
    "gradient_bytes": Range(0, 1e15, above=True),
    "bandwidth": Range(0, 1e15, above=True),
    "latency": Range(0, MOST),
    "price": Range(0, MOST),
}
"""Options that are figures, and their bounds."""


@dataclass(frozen=True)
class Basis:
    """What a plan is made from.

    Attributes:
        model: figures.
        measured: those of one worker.
        phases: batches of the run.
        sources: where each figure comes from, a line each.
    """

    model: "PerformanceModel"
    measured: "Measured"
    phases: "Sequence[Phase]"
    sources: dict[str, str]


def add(commands: Any) -> dict[str, Callable[[Namespace], int]]:
    """Add the parsers; returns what runs each command."""
    plan = add_command(
        commands, "plan", "predict time, efficiency and cost of a run on many workers"
    )
    plan.add(
        "--workers",
        type=str,
        default="1..1024",
        help="1..1024 doubles from 1 to 1024; 1,2,6 is a list",
    )
    plan.add(
        "--run",
        type=path,
        default=None,
        help="run directory with the settings and batches to plan for",
    )
    plan.add(
        "--measured",
        type=path,
        default=None,
        help=(
            "JSON file with step times, such as the plan.json of a plan made elsewhere; default:"
            " measured here"
        ),
    )
    for name, text in (
        ("slope", "seconds an example in forward and backward pass, in place of a measurement"),
        ("intercept", "seconds a microbatch beside that"),
        ("update_seconds", "seconds of an optimizer step; default: measured with the rest"),
    ):
        plan.add(option(name), type=float | None, default=None, help=text)
    plan.add(
        "--gradient-bytes",
        type=int | None,
        default=None,
        help="default: those of the model, in float32",
    )
    plan.add(
        "--bandwidth", type=float | None, default=None, help="bytes a second between two workers"
    )
    plan.add(
        "--latency", type=float | None, default=None, help="seconds a message between two workers"
    )
    plan.add(
        "--membership",
        type=Literal["fixed", "elastic"],
        default="fixed",
        help=(
            "fixed: all workers are held throughout; elastic: as many as get a full microbatch each"
        ),
    )
    plan.add("--price", type=float, default=0.0, help="of one worker for one hour, in any currency")
    plan.add(
        "--out", type=path, default=None, help="folder; default: plan, in the run directory if any"
    )
    add_settings(plan, (*SCHEDULE, *HERE))
    plan.add(
        "--code",
        type=str | None,
        default=None,
        help="for a run with a method of your own: its package.module:Class again",
    )
    plan_dual_batch.add(
        plan.add_subcommands(required=False, title="other kinds of plans", metavar="KIND")
    )
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
    """Return a setting as it was typed, of a method its name."""
    return value["name"] if isinstance(value, dict) else value


def _run(arguments: Namespace) -> "Run":
    from hessianflow.build import load_config, on_this_machine, prepare
    from hessianflow.planning.measure import Run
    from hessianflow.runs import History

    changed = arguments.given.settings(arguments)
    if arguments.run is None:
        config = prepare(TrainConfig(**changed))
        arguments.given.check(config)
        return Run(config)
    for name in changed:
        if name in SCHEDULE and name != "model":
            raise HessianFlowError(
                f"{option(name)} {_said(changed[name])}: --run {arguments.run} sets that, leave one"
                " out"
            )
    require_settings(arguments.run, "plan", "hf.planning.predict")
    require_named_code(arguments.run, arguments)
    config = on_this_machine(replace(load_config(arguments.run), **changed))
    return Run(config, History.load(arguments.run))


def _basis(arguments: Namespace, run: "Run") -> Basis:
    from hessianflow.planning import AllReduceTime, PerformanceModel
    from hessianflow.planning.measure import planned_phases, recorded_phases

    config = run.config
    by_batch = not isinstance(config.microbatch_size, int)
    microbatch = (
        config.microbatch_size if isinstance(config.microbatch_size, int) else config.batch_size
    )
    if run.history is None:
        phases, how = planned_phases(run)
    else:
        phases, how = (
            recorded_phases(run.history, config.epochs),
            f"recorded in {arguments.run}",
        )
    measured = _measured(arguments, run, microbatch)
    update = (
        measured.update_seconds if arguments.update_seconds is None else arguments.update_seconds
    )
    size = arguments.gradient_bytes or measured.gradient_bytes or run.gradient_bytes
    bandwidth, latency = (
        arguments.bandwidth or BANDWIDTH,
        LATENCY if arguments.latency is None else arguments.latency,
    )
    origins = {
        name: "as given" if arguments[name] is not None else text for name, text in ORIGINS.items()
    }
    line = measured.step_time
    sizes = f"{len(measured.sizes)} sizes up to {max(measured.sizes)}, " if measured.sizes else ""
    fit = f"; {sizes}at most {line.residual:.0%} off the line" if sizes else ""
    sources = {
        "step": (
            f"{1e3 * line.intercept:.3g} ms + {1e3 * line.slope:.3g} ms an example:"
            f" {measured.source}{fit}"
        ),
        "update": "not counted: unknown" if update is None else f"{1e3 * update:.3g} ms",
        "gradients": f"{size / 1e6:.3g} MB",
        "bandwidth": f"{bandwidth / 1e9:.3g} GB/s: {origins['bandwidth']}",
        "latency": f"{1e6 * latency:.3g} us: {origins['latency']}",
        "microbatch": (
            f"at most {microbatch} examples:"
            f" {'the batch size at the start' if by_batch else 'as given'}"
        ),
        "batches": f"{_sizes(phases)} over {sum(p.examples for p in phases)} examples: {how}",
        "left out": (
            "adversary, curvature, evaluation, data; no sum is hidden behind a backward pass"
        ),
    }
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
        update or 0.0,
        arguments.price,
        "; ".join(f"{name}: {text}" for name, text in sources.items()),
    )
    return Basis(
        model, replace(measured, update_seconds=update, gradient_bytes=size), phases, sources
    )


def _measured(arguments: Namespace, run: "Run", microbatch: int) -> "Measured":
    from hessianflow.planning import StepTime
    from hessianflow.planning.measure import Measured, measure, read_measured

    if arguments.slope is not None:
        return Measured(StepTime(arguments.slope, arguments.intercept), source="as given")
    return (
        measure(run, microbatch)
        if arguments.measured is None
        else read_measured(arguments.measured)
    )


def _sizes(phases: "Sequence[Phase]") -> str:
    from hessianflow.planning.measure import merged

    sizes = [phase.batch_size for phase in merged(phases)]
    shown = sizes if len(sizes) <= 6 else [*sizes[:3], "...", *sizes[-2:]]
    return " -> ".join(map(str, shown))


def _table(predictions: "Sequence[Prediction]", price: float) -> str:
    head = (
        f"{'workers':>8}{'time':>12}{'speed-up':>10}{'efficiency':>12}{'all-reduce':>12}"
        f"{'updates':>9}"
    )
    lines = [f"{head}{'worker hours':>14}{'cost':>11}" if price else f"{head}{'worker hours':>14}"]
    for p in predictions:
        line = (
            f"{p.workers:>8}{duration(p.seconds):>12}{p.speedup:>10.4g}{p.efficiency:>12.1%}"
            f"{p.communication:>12.1%}"
        )
        line += f"{p.updates:>9}{p.worker_seconds / 3600:>14.4g}"
        lines.append(f"{line}{p.cost:>11.4g}" if price else line)
    return "\n".join(lines)


def _verdict(predictions: "Sequence[Prediction]") -> str:
    fastest = min(predictions, key=lambda p: p.seconds)
    used = [p.workers for p in predictions if p.efficiency >= 0.5]
    half = f"; at least half of every worker's time is used up to {max(used)}" if used else ""
    return f"fastest on {fastest.workers}: {duration(fastest.seconds)}{half}"


def duration(seconds: float) -> str:
    """Return a time in the unit that reads best."""
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
