"""The `hessianflow` command: every argument mistake or bad input is one line on standard error and exit status 2."""

import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from hessianflow.config import TrainConfig, option
from hessianflow.interfaces import HessianFlowError

if TYPE_CHECKING:
    from hessianflow.training import AdaptiveBatchTrainer, History

PLOTS = "plots"


class _Parser(ArgumentParser):
    """Reports a mistake on one line, in the spelling of the command line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # noqa: ARG002
        line = " ".join(message.split())
        key = re.match(r'Parser key "(\w+)": (.*)', line)
        if key:
            line = f"{option(key[1])}: {_plain(key[2])}"
        line = line.replace("unrecognized arguments:", "unknown option:")
        sys.stderr.write(f"{self.prog}: error: {line} (see {self.prog} --help)\n")
        sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else list(arguments)
    parsed = parser.parse_args(given)
    name = parsed.subcommand
    if name is None:
        parser.print_help()
        return 0
    try:
        return _COMMANDS[name](parsed[name])
    except HessianFlowError as error:
        sys.stderr.write(f"hessianflow {name}: error: {' '.join(str(error).split())}\n")
        return 2


def _train(arguments: Namespace) -> int:
    from hessianflow.build import build_trainer, prepare

    settings = {field.name: arguments[field.name] for field in fields(TrainConfig)}
    config = prepare(TrainConfig(**settings))
    if config.run_dir is None:
        config = replace(config, run_dir=_new_run_dir(config))
    trainer = build_trainer(config)
    return _run(trainer, trainer.fit, draw=config.plots)


def _resume(arguments: Namespace) -> int:
    from hessianflow.build import build_trainer, load_config, prepare

    config = prepare(load_config(arguments.run_dir))
    trainer = build_trainer(config)
    return _run(trainer, lambda: trainer.resume(arguments.run_dir), draw=config.plots)


def _run(trainer: "AdaptiveBatchTrainer", work: "Callable[[], History]", *, draw: bool) -> int:
    stopped_by: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        stopped_by.append(number)
        trainer.request_stop()
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        history = work()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    _print_summary(history)
    if draw and history.epochs and history.run_dir is not None:
        _draw([history.run_dir], history.run_dir / PLOTS)
    return 130 if signal.SIGINT in stopped_by else 0


def _plot(arguments: Namespace) -> int:
    runs = [Path(run) for run in arguments.run_dirs]
    from hessianflow.training import History

    for run in runs:
        if not History.load(run).epochs:
            raise HessianFlowError(f"{run} holds no completed epoch yet: nothing to plot")
    folder = Path(arguments.out) if arguments.out else runs[0] / PLOTS if len(runs) == 1 else Path(PLOTS)
    _draw(runs, folder)
    return 0


def _draw(runs: list[Path], folder: Path) -> None:
    from hessianflow import plots

    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (
        ("curvature_trajectory", plots.curvature_trajectory),
        ("training_curves", plots.training_curves),
    ):
        path = folder / f"{name}.png"
        draw(runs, path=path)
        print(f"  {path}")


def _print_summary(history: "History") -> None:
    summary, seconds = history.summary, history.summary["seconds"]
    accuracy = ""
    if summary["final_accuracy"] is not None:
        accuracy = f"test accuracy {summary['final_accuracy']:.2%} (best {summary['best_accuracy']:.2%}); "
    print(
        f"{summary['status']}: {accuracy}{summary['epochs']} epochs, {summary['updates']} updates, "
        f"largest batch {summary['largest_batch']}; {summary['wall_seconds']:.1f} s, of which "
        f"{seconds['curvature']:.1f} s curvature and {seconds['adversary']:.1f} s adversary"
    )
    for row in history.growths:
        print(f"  epoch {row['epoch']:>3}: batch {row['from']} -> {row['to']}: {row['reason']}")
    if history.run_dir is not None:
        print(f"  {history.run_dir}")


def _new_run_dir(config: TrainConfig) -> str:
    from datetime import datetime

    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    base = Path("runs") / f"{config.data}-{config.model}-{config.controller}-seed{config.seed}-{stamp}"
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return str(path)


def _parser() -> ArgumentParser:
    parser = _Parser(prog="hessianflow", description="Train with a batch size that the curvature of the loss drives.")
    commands = parser.add_subcommands(required=False, title="commands", metavar="COMMAND")
    train = _Parser(prog="hessianflow train", description="Train; no argument needed.")
    train.add_argument("--config", action="config", help="YAML file of settings, spelled as in config.json")
    texts = _field_texts()
    hints = get_type_hints(TrainConfig)
    for field in fields(TrainConfig):
        train.add_argument(
            option(field.name), dest=field.name, type=hints[field.name], default=field.default, help=texts[field.name]
        )
    commands.add_subcommand("train", train, help="train a network")
    resume = _Parser(prog="hessianflow resume", description="Continue an interrupted run from its newest checkpoint.")
    resume.add_argument("run_dir", type=str, help="run directory")
    commands.add_subcommand("resume", resume, help="continue an interrupted run")
    plot = _Parser(prog="hessianflow plot", description="Draw curvature trajectory and training curves of runs.")
    plot.add_argument("run_dirs", type=str, nargs="+", help="run directories, drawn over each other")
    plot.add_argument("--out", type=str, default=None, help="folder for the pictures; default: RUN_DIR/plots or plots")
    commands.add_subcommand("plot", plot, help="draw one or several runs")
    for name, command in (("train", train), ("resume", resume), ("plot", plot)):
        command.prog = f"hessianflow {name}"
    return parser


def _field_texts() -> dict[str, str]:
    """Help texts from the one place that documents the settings: the docstring of TrainConfig."""
    from docstring_parser import parse

    return {p.arg_name: " ".join((p.description or "").split()) for p in parse(TrainConfig.__doc__ or "").params}


def _plain(message: str) -> str:
    """jsonargparse's words without Python's."""
    union = re.search(r"Subtypes: \[(.*)\] Errors: .* Given value: (.*)", message)
    if union:
        message = f"Expected a {union[1]}. Got value: {union[2]}".replace(", <class 'NoneType'>", "")
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    message = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", message)
    message = message.replace("tuple[int, ...]", "list of whole numbers like [30, 60]")
    return message.replace("Expected a ", "expected ").replace(". Got value: ", ", got ")


_COMMANDS: dict[str, Callable[[Namespace], int]] = {"train": _train, "resume": _resume, "plot": _plot}
