"""The command `plan dual-batch`, which predicts a run of workers with small and large batches."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from jsonargparse import Namespace

from hessianflow.bounds import MOST, MOST_PROCESSES, check_range, option
from hessianflow.commands.parser import add_command
from hessianflow.config import ResolutionName
from hessianflow.control.dual_batch import DualBatchPlan
from hessianflow.control.published import PUBLISHED, Published
from hessianflow.control.resolution import Level
from hessianflow.control.time_model import TimeModel
from hessianflow.interfaces import HessianFlowError

PresetName = Literal["cifar100", "imagenet", "compsac"]
_BOUNDS = {
    "workers": (1, MOST_PROCESSES),
    "small_workers": (0, MOST_PROCESSES),
    "extra_time": (1, 1e6),
    "examples": (1, MOST),
    "batch_size": (1, MOST),
}
_GIVEN = ("examples", "batch_size", "slope", "intercept")


def add(kinds: Any) -> None:
    """Add the parser to the kinds of plans."""
    about = "print the shares, batches and times of a dual-batch run"
    plan = add_command(kinds, "dual-batch", about, prefix="hessianflow plan")
    plan.add_open("--preset", PresetName | None, "published setting (arXiv:2509.26092)")
    plan.add_option("--workers", int, 4, "number of workers")
    about = "number of workers with the small batch; default: a line for each number"
    plan.add_open("--small-workers", int | None, about)
    about = "largest time of an epoch, relative to that with large batches only"
    plan.add_option("--extra-time", float, 1.05, about)
    plan.add_open("--examples", int | None, "examples of an epoch")
    plan.add_open("--batch-size", int | None, "size of the large batch")
    plan.add_open("--slope", float | None, "seconds per example")
    plan.add_open("--intercept", float | None, "seconds per step")
    about = "order of the resolutions of a preset that has several"
    plan.add_option("--resolution", ResolutionName, "cyclic", about)


def run(arguments: Namespace) -> int:
    """Print the tables, and the predicted time of a published run."""
    for name, (low, high) in _BOUNDS.items():
        if arguments[name] is not None:
            check_range(option(name), arguments[name], low, high)
    for name in ("slope", "intercept"):  # the time model refuses what is too small
        if arguments[name] is not None:
            check_range(option(name), arguments[name], -MOST, MOST)
    setting = _setting(arguments)
    workers = arguments.workers
    counts = list(range(workers + 1))
    if arguments.small_workers is not None:
        counts = [arguments.small_workers]
    if counts[0] > workers:
        raise HessianFlowError(f"--small-workers {counts[0]} is more than --workers {workers}")
    for index, (level, time) in enumerate(zip(setting.levels, setting.times, strict=True)):
        line = f"t(B) = {time.slope:g} B + {time.intercept:g} s, large batch {level.batch_size}"
        if arguments.preset:
            line = f"{level.resolution} pixels: {line}"
        print(line)
        plans = [_plan(setting, index, workers, small, arguments.extra_time) for small in counts]
        print(_table(plans))
    if arguments.preset:
        _print_run(setting, arguments, counts[-1])
    return 0


def _setting(arguments: Namespace) -> Published:
    """Return the preset, or one made of the figures given; `--examples` may replace its own."""
    figures = {name: arguments[name] for name in _GIVEN if arguments[name] is not None}
    if arguments.preset is not None:
        preset = PUBLISHED[arguments.preset]
        if figures.keys() - {"examples"}:
            name = next(iter(figures.keys() - {"examples"})).replace("_", "-")
            raise HessianFlowError(
                f"--{name} and --preset {arguments.preset} both give it: leave one out"
            )
        return replace(preset, **figures)
    missing = [name.replace("_", "-") for name in _GIVEN if name not in figures]
    if missing:
        raise HessianFlowError(f"--{missing[0]} is needed, or --preset {', '.join(PUBLISHED)}")
    time = TimeModel(figures["slope"], figures["intercept"])
    return Published(
        "", figures["examples"], (Level(1, figures["batch_size"]),), (time,), (1,), 0.0, 0.0
    )


def _plan(
    setting: Published, level: int, workers: int, small: int, ratio: float
) -> DualBatchPlan | str:
    """Return the plan, or the reason why there is none."""
    try:
        return setting.plan(level, workers, small, ratio)
    except HessianFlowError as error:
        # Only too much extra time concerns one line of the table and not all of them.
        if "must be <" not in str(error):
            raise
        return str(error)


def _table(plans: Sequence[DualBatchPlan | str]) -> str:
    heads = ("small", "B_S", "d_S", "f", "B_L", "d_L", "epoch s", "kinds differ", "one device s")
    widths = (5, 7, 9, 8, 7, 9, 11, 14, 14)
    lines = ["".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))]
    for plan in plans:
        if isinstance(plan, str):
            lines.append(f"      {plan}")
            continue
        cells = [str(sum(worker.small for worker in plan.workers)), "-", "-", "-", "-", "-"]
        small = plan.small
        if small is not None:
            cells[1:4] = str(small.batch_size), str(small.examples), f"{small.update_factor:.4f}"
        large = plan.large
        if large is not None:
            cells[4:] = str(large.batch_size), str(large.examples)
        slowest = max(worker.seconds for worker in plan.workers)
        cells += [f"{slowest:.4f}", f"{plan.imbalance:.2%}", f"{plan.one_device_seconds:.3f}"]
        lines.append("".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    return "\n".join(lines)


def _print_run(setting: Published, arguments: Namespace, small: int) -> None:
    """Print the predicted seconds of a whole run, with and without small workers.

    A preset with several resolutions has the seconds in their order beside those at the full one.
    """
    for count in dict.fromkeys((0, small)):
        full = _seconds(setting, arguments, count, None)
        text = (
            f"{setting.phase_ends[-1]} epochs with {count} small workers: {full:.1f} s at"
            f" {setting.levels[-1].resolution} pixels"
        )
        if len(setting.levels) > 1:
            seconds = _seconds(setting, arguments, count, arguments.resolution)
            text += f", {seconds:.1f} s {arguments.resolution} ({seconds / full:.4f} of it)"
        print(text)


def _seconds(
    setting: Published, arguments: Namespace, small: int, resolution: ResolutionName | None
) -> float:
    """Return the predicted seconds of a run; without an order of resolutions, at the full one."""
    levels = {level.resolution: index for index, level in enumerate(setting.levels)}
    total = 0.0
    for stage in setting.stages(resolution):
        plan = setting.plan(
            levels[stage.level.resolution], arguments.workers, small, arguments.extra_time
        )
        total += (stage.end - stage.start) * plan.target_seconds
    return total
