"""The commands `train` and `resume`."""

import logging
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from hessianflow.commands.parser import add_command, path
from hessianflow.commands.runs import add_named_code, printable, require_named_code
from hessianflow.commands.settings import add_settings, commented
from hessianflow.commands.signals import NUMBERS, Signalled
from hessianflow.config import RunConfig, TrainConfig
from hessianflow.data.datasets import data_set
from hessianflow.interfaces import HessianFlowError
from hessianflow.resolve import resolve

if TYPE_CHECKING:
    from hessianflow.dual_batch import DualBatchTrainer
    from hessianflow.elastic import ElasticTrainer
    from hessianflow.interfaces import World
    from hessianflow.runs import History
    from hessianflow.training import AdaptiveBatchTrainer

    AnyTrainer = AdaptiveBatchTrainer | DualBatchTrainer | ElasticTrainer


SHOWN_CHANGES = 20
"""Most lines about the batch size after a run, because a controller that decides every few updates
would fill the screen. This default is our choice."""


def add(commands: Any) -> dict[str, Callable[[Namespace], int]]:
    """Add the parsers, and return the function of each command."""
    about = "train a network: without options, a small one on digits"
    train = add_command(commands, "train", about)
    about = "YAML file of settings in the form of --print-config; options typed take precedence"
    train.add_open("--config", str | None, about)
    about = "print all settings as a YAML file with comments instead of training"
    train.add_option("--print-config", bool, False, about)
    add_settings(train)
    about = "continue an interrupted run from its newest checkpoint"
    resume = add_command(commands, "resume", about)
    resume.add("run_dir", type=path, help="run directory")
    add_named_code(resume)
    return {"train": _train, "resume": _resume}


def _train(arguments: Namespace) -> int:
    from hessianflow.commands.ranks import launched
    from hessianflow.training.world import on_first_rank

    def settings() -> RunConfig:
        config = resolve(TrainConfig(**arguments.given.settings(arguments)))
        arguments.given.check(config)
        return config

    if arguments.print_config:
        print(commented(settings()))
        return 0

    with launched(lambda: _prepared(settings())) as (world, config), ExitStack() as stack:
        run_dir = on_first_rank(
            world, lambda: config.run_dir or stack.enter_context(_new_run_dir(config))
        )
        config = replace(config, run_dir=run_dir)
        status, history = _run(world, config, lambda trainer: trainer.fit())
    return _shown(world, config, history, status)


def _prepared(config: RunConfig) -> RunConfig:
    """Return the settings for this machine; workers of an elastic run prepare themselves."""
    from hessianflow.parts import on_this_machine

    if config.elastic:
        return config
    return on_this_machine(config)


def _resume(arguments: Namespace) -> int:
    from hessianflow.commands.ranks import launched
    from hessianflow.parts import load_config

    def settings() -> RunConfig:
        require_named_code(arguments.run_dir, arguments)
        return _prepared(load_config(arguments.run_dir))

    with launched(settings) as (world, config):
        if _has_finished(world, arguments.run_dir):
            return 0
        status, history = _run(world, config, lambda trainer: trainer.resume(arguments.run_dir))
    return _shown(world, config, history, status)


def _has_finished(world: "World", run_dir: str) -> bool:
    from hessianflow.runs.documents import read_summary
    from hessianflow.training.world import on_first_rank

    finished = on_first_rank(world, lambda: read_summary(Path(run_dir))).get("status") == "finished"
    if finished and world.rank == 0:
        print(f"{printable(run_dir)} has finished already: nothing to resume")
    return finished


def _run(
    world: "World", config: RunConfig, work: "Callable[[AnyTrainer], History]"
) -> tuple[int, "History"]:
    """Build a trainer, run `work` on it, and return the exit status and the records.

    A signal stops all ranks. A second one raises an exception, and a third one ends the process.
    """
    from hessianflow.training.world import on_all_ranks

    trainer = on_all_ranks(world, lambda: _trainer(config, world))
    stopped_by: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        stopped_by.append(number)
        trainer.request_stop()
        signal.signal(number, abandon)

    def abandon(number: int, _frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Signalled(number)

    previous = {number: signal.signal(number, stop) for number in NUMBERS}
    try:
        with _logging_to_stderr(config.log_level):
            history = work(trainer)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    status = 0
    if stopped_by:
        status = 128 + stopped_by[0]
    return max(world.gather(status)), history


class _AboveTheBar(logging.Handler):
    """A handler that writes lines without tearing the progress bar below them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line of a record."""
        from tqdm import tqdm

        tqdm.write(f"hessianflow: {self.format(record)}", file=sys.stderr)


@contextmanager
def _logging_to_stderr(level: str | None) -> Iterator[None]:
    """Write the messages of the logger "hessianflow" to standard error while active.

    The least severe `level` is "info" on a terminal and "warning" elsewhere if it is None.
    """
    if level is None and sys.stderr.isatty():
        level = "info"
    logger = logging.getLogger("hessianflow")
    handler = _AboveTheBar()
    previous_level = logger.level
    previous_propagate = logger.propagate
    logger.setLevel((level or "warning").upper())
    logger.propagate = False  # a root handler of the calling program would repeat the line
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(previous_level)
        logger.propagate = previous_propagate


def _trainer(config: RunConfig, world: "World") -> "AnyTrainer":
    from hessianflow.runs import LogSink

    has_own_workers = {"--controller dual-batch": config.is_dual_batch, "--elastic": config.elastic}
    for name, is_so in has_own_workers.items():
        if is_so and world.world_size > 1:
            raise HessianFlowError(f"{name} has workers of its own: start it without torchrun")
    if config.is_dual_batch:
        from hessianflow.dual_batch import build_dual_batch

        return build_dual_batch(config, [LogSink()])
    if config.elastic:
        from hessianflow.elastic import build_elastic

        return build_elastic(config, [LogSink()])
    from hessianflow.build import build_trainer

    return build_trainer(config, [LogSink()], world)


def _shown(world: "World", config: RunConfig, history: "History", status: int) -> int:
    """Print and draw the outcome on rank 0, while no other rank waits; return the exit status."""
    if world.rank == 0:
        _print_summary(history, config)
        if config.plots and history.epochs and history.run_dir is not None:
            from hessianflow.commands.records import draw

            draw([history.run_dir], history.run_dir / "plots")
    return status


def _print_summary(history: "History", config: RunConfig) -> None:
    summary = history.summary
    seconds = history.summary["seconds"]
    result = _bits_per_byte(history, config)
    if summary["final_accuracy"] is not None:
        result += (
            f"test accuracy {summary['final_accuracy']:.2%} (best {summary['best_accuracy']:.2%}); "
        )
    print(
        f"{summary['status']}: {result}{summary['epochs']} epochs, {summary['updates']} updates, "
        f"largest batch {summary['largest_batch']}; {summary['wall_seconds']:.1f} s, of which "
        f"{seconds['curvature']:.1f} s curvature and {seconds['adversary']:.1f} s adversary"
    )
    changes = [row for row in history.of_kind("batch") if row["from"] != row["to"]]
    for row in changes[:SHOWN_CHANGES]:
        print(f"  epoch {row['epoch']:>3}: batch {row['from']} -> {row['to']}: {row['reason']}")
    if len(changes) > SHOWN_CHANGES:
        print(f"  and {len(changes) - SHOWN_CHANGES} more changes, listed in history.jsonl")
    if not history.curvature and any(row["event"] == "budget" for row in history.of_kind("event")):
        print(
            "  no curvature was measured: the first reading may cost at most a quarter of the"
            " training (--curvature-budget 100 has no limit)"
        )
    run_dir = printable(history.run_dir or "")
    print(f"  {run_dir}")
    if summary["status"] == "preempted":
        if ":" in config.model:
            run_dir += f" --model {config.model}"
        print(f"  hessianflow resume {run_dir}  continues")


def _bits_per_byte(history: "History", config: RunConfig) -> str:
    """Return the last test loss of a language model in nats and bits; empty for other models."""
    losses = [row["eval_loss"] for row in history.epochs[-1:] if row["eval_loss"] is not None]
    if not data_set(config.data).is_text or not losses:
        return ""
    return f"test loss {losses[0]:.4f} nats, {losses[0] / math.log(2):.4f} bits per byte; "


def _plain_name(name: str) -> str:
    """Return the name of a model or method in a form that a folder's name may contain."""
    return name.replace(":", "-").replace("/", "-")


@contextmanager
def _new_run_dir(config: RunConfig) -> Iterator[str]:
    """Yield a new directory below runs/ for this run; remove it at the end if it is empty."""
    from hessianflow.runs.folder import new_folder

    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    model = _plain_name(config.model)
    controller = _plain_name(config.controller.name)
    name = f"{config.data}-{model}-{controller}-seed{config.seed}-{stamp}"
    with new_folder(Path("runs") / name) as path:
        yield str(path)
