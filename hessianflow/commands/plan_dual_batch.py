"""`hessianflow plan dual-batch`: shares, batch sizes and predicted times of workers with small and
large batches."""

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

NAME = "dual-batch"
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
    plan = add_command(
        kinds,
        NAME,
        "print the shares, batches and times of a dual-batch run",
        prefix="hessianflow plan",
    )
    plan.add(
        "--preset",
        type=PresetName | None,
        default=None,
        help="a published setting (arXiv:2509.26092)",
    )
    plan.add("--workers", type=int, default=4, help="how many there are")
    plan.add(
        "--small-workers",
        type=int | None,
        default=None,
        help="of them; default: a line for each number",
    )
    plan.add(
        "--extra-time",
        type=float,
        default=1.05,
        help="what an epoch may take, relative to large batches",
    )
    plan.add("--examples", type=int | None, default=None, help="of an epoch")
    plan.add("--batch-size", type=int | None, default=None, help="the large batch")
    plan.add("--slope", type=float | None, default=None, help="seconds an example")
    plan.add("--intercept", type=float | None, default=None, help="seconds a step")
    plan.add(
        "--resolution",
        type=ResolutionName,
        default="cyclic",
        help="schedule of a preset with several resolutions",
    )


def run(arguments: Namespace) -> int:
    """Print the tables, and what a published run would take."""
    for name, (low, high) in _BOUNDS.items():
        if arguments[name] is not None:
            check_range(option(name), arguments[name], low, high)
    for name in ("slope", "intercept"):  # the model of times says what is too small
        if arguments[name] is not None:
            check_range(option(name), arguments[name], -MOST, MOST)
    setting = _setting(arguments)
    workers, chosen = arguments.workers, arguments.small_workers
    if chosen is not None and chosen > workers:
        raise HessianFlowError(f"--small-workers {chosen} is more than --workers {workers}")
    counts = range(workers + 1) if chosen is None else [chosen]
    for index, (level, time) in enumerate(zip(setting.levels, setting.times, strict=True)):
        at = f"{level.resolution} pixels: " if arguments.preset else ""
        print(f"{at}t(B) = {time.slope:g} B + {time.intercept:g} s, large batch {level.batch_size}")
        print(
            _table(
                [_plan(setting, index, workers, small, arguments.extra_time) for small in counts]
            )
        )
    if arguments.preset:
        _print_run(setting, arguments, counts[-1])
    return 0


def _setting(arguments: Namespace) -> Published:
    """Return the preset, or one made of the figures given; figures given with a preset replace its
    own."""
    given = {name: arguments[name] for name in _GIVEN if arguments[name] is not None}
    if arguments.preset is not None:
        preset = PUBLISHED[arguments.preset]
        if given.keys() - {"examples"}:
            name = next(iter(given.keys() - {"examples"})).replace("_", "-")
            raise HessianFlowError(
                f"--{name} and --preset {arguments.preset} both give it: leave one out"
            )
        return replace(preset, **given)
    missing = [name.replace("_", "-") for name in _GIVEN if name not in given]
    if missing:
        raise HessianFlowError(f"--{missing[0]} is needed, or --preset {', '.join(PUBLISHED)}")
    time = TimeModel(given["slope"], given["intercept"])
    return Published(
        "", given["examples"], (Level(1, given["batch_size"]),), (time,), (1,), 0.0, 0.0
    )


def _plan(
    setting: Published, level: int, workers: int, small: int, ratio: float
) -> DualBatchPlan | str:
    """Return the plan, or why there is none."""
    try:
        return setting.plan(level, workers, small, ratio)
    except HessianFlowError as error:
        # anything but too much extra time is wrong for every line
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
        small, large, count = plan.small, plan.large, sum(worker.small for worker in plan.workers)
        cells = [str(count)]
        cells += (
            ["-", "-", "-"]
            if small is None
            else [str(small.batch_size), str(small.examples), f"{small.update_factor:.4f}"]
        )
        cells += ["-", "-"] if large is None else [str(large.batch_size), str(large.examples)]
        slowest = max(worker.seconds for worker in plan.workers)
        cells += [f"{slowest:.4f}", f"{plan.imbalance:.2%}", f"{plan.one_device_seconds:.3f}"]
        lines.append("".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    return "\n".join(lines)


def _print_run(setting: Published, arguments: Namespace, small: int) -> None:
    """Print the seconds of a whole run at full resolution and with the schedule, with and without
    small workers."""
    several = len(setting.levels) > 1
    for count in dict.fromkeys((0, small)):
        total = {}
        for name in (None, arguments.resolution) if several else (None,):
            sizes = {level.resolution: index for index, level in enumerate(setting.levels)}
            total[name] = sum(
                (stage.end - stage.start)
                * setting.plan(
                    sizes[stage.level.resolution], arguments.workers, count, arguments.extra_time
                ).target_seconds
                for stage in setting.stages(name)
            )
        epochs = setting.phase_ends[-1]
        text = (
            f"{epochs} epochs with {count} small workers: {total[None]:.1f} s at"
            f" {setting.levels[-1].resolution} pixels"
        )
        if several:
            share = total[arguments.resolution] / total[None]
            text += (
                f", {total[arguments.resolution]:.1f} s {arguments.resolution} ({share:.4f} of it)"
            )
        print(text)
