"""The basis of a plan: the time of steps, the bytes summed between workers, the run's batches."""

import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hessianflow.bounds import MOST, check_range, shortened
from hessianflow.choices import build_controller, build_optimizer
from hessianflow.config import RunConfig
from hessianflow.control import TimeModel, fit_time_model
from hessianflow.interfaces import HessianFlowError, Progress
from hessianflow.parts import Parts, build_parts, resolved_precision
from hessianflow.planning.performance import Phase, measure_steps
from hessianflow.runs import History
from hessianflow.runs.documents import read_measurement
from hessianflow.training.accumulate import GradientAccumulator

MOST_EPOCHS = 1_000_000
"""Most epochs of a plan, which goes through all of them. This default is our choice."""
MOST_COUNTS = 1000
"""Most numbers of workers of a plan, each a line of the table. This default is our choice."""
REPEATS = 9
"""Steps of each size over which the median is taken. This default is our choice."""


@dataclass(frozen=True)
class Measured:
    """The times of one worker, and the bytes that it would exchange.

    Attributes:
        step_time: Time of forward and backward on a microbatch.
        sizes, seconds: Examples of the microbatches measured, and their median seconds; empty if
            the line itself was given.
        update_seconds: Seconds of an optimizer step; None if unknown.
        gradient_bytes: Bytes of all gradients; None if unknown.
        source: Origin of the step time, in words.
    """

    step_time: TimeModel
    sizes: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    update_seconds: float | None = None
    gradient_bytes: int | None = None
    source: str = ""


@dataclass
class PlanBasis:
    """The run that is planned: settings, records if it has any, and a model built on demand."""

    config: RunConfig
    history: History | None = None

    @cached_property
    def parts(self) -> Parts:
        """Return the model and the data of the run."""
        return build_parts(self.config)

    @cached_property
    def examples(self) -> int:
        """Return the number of examples of an epoch."""
        if self.history is not None:
            return int(self.history.fact("examples_per_epoch"))
        return self.config.train_examples or self.parts.train.num_examples

    @cached_property
    def gradient_bytes(self) -> int:
        """Return the bytes of all gradients in float32, in which they are summed."""
        if self.history is not None:
            return 4 * int(self.history.fact("parameters"))
        return 4 * sum(p.numel() for p in self.parts.model.parameters() if p.requires_grad)


def read_measured(path: str) -> Measured:
    """Return figures from a JSON file: a plan.json, or an object with the keys of its "measured".

    Raises:
        HessianFlowError: The file or its step times are missing, or a type or bound is wrong.
    """
    try:
        content = read_measurement(Path(path))
        sizes = tuple(content.get("sizes", ()))
        seconds = tuple(map(float, content.get("seconds", ())))
        if sizes:
            line = fit_time_model(sizes, seconds, clip_intercept=True)
        else:
            line = TimeModel(content["slope"], content["intercept"])
    except HessianFlowError as error:
        raise HessianFlowError(f"--measured {error}") from None
    source = f"{content.get('source', 'measured')} ({path})"
    others = (content.get("update_seconds"), content.get("gradient_bytes"))
    return Measured(line, sizes, seconds, *others, source)


def measure(run: PlanBasis, microbatch_size: int) -> Measured:
    """Time forward and backward for a few sizes, and the optimizer's step, on this machine."""
    config = run.config
    parts = run.parts
    largest = min(microbatch_size, parts.train.num_examples)
    sizes = sorted({max(1, largest // divisor) for divisor in (8, 4, 2, 1)})
    if largest == 1:  # a line needs two sizes
        sizes.append(2)
    batches = {size: parts.train.sample(size, config.seed) for size in sizes}
    trained = [p for p in parts.model.parameters() if p.requires_grad]
    optimizer = build_optimizer(config, parts.model)
    precision = resolved_precision(config)
    loss = nn.CrossEntropyLoss()
    accumulate = GradientAccumulator(parts.model, loss, trained, precision=precision)

    def update(_: int) -> float:
        optimizer.step()
        return float(trained[0].detach().flatten()[0])  # waits for the device

    parts.model.train()

    def backward(size: int) -> float:
        return float(accumulate(batches[size]).loss)

    seconds = measure_steps(backward, sizes, repeats=REPEATS)
    [update_seconds] = measure_steps(update, [1], repeats=REPEATS)
    line = fit_time_model(sizes, seconds, clip_intercept=True)
    others = (update_seconds, run.gradient_bytes, _here(config))
    return Measured(line, tuple(sizes), tuple(seconds), *others)


def planned_phases(run: PlanBasis) -> tuple[list[Phase], str]:
    """Return the batches of a run that has not been made, one phase per epoch, and their origin.

    Raises:
        HessianFlowError: The controller decides from measurements of a run.
    """
    config = run.config
    controller = build_controller(config)
    epochs = config.counted_epochs
    examples = -(-run.examples // (config.epoch_parts or 1))
    phases = []
    guessed = False
    for epoch in range(1, epochs + 1):
        phases.append(Phase(examples, controller.decision.batch_size))
        if controller.needs - {"eigenvalue"}:
            raise HessianFlowError(
                f"--controller {config.controller.name} decides from measurements of a run: name"
                " one it made with --run, or plan with --controller fixed"
            )
        guessed = guessed or "eigenvalue" in controller.needs
        progress = Progress(epoch, epoch * examples, 0, examples, epochs)
        if controller.is_due(progress):
            controller.update(progress)
    origin = f"--controller {config.controller.name}"
    if guessed:
        origin = f"{origin} growing by patience alone, without eigenvalues"
    return phases, origin


def recorded_phases(history: History, epochs: int) -> list[Phase]:
    """Return the batches of a recorded run by epoch; if it was cut short, the last size goes on."""
    if epochs > MOST_EPOCHS:
        raise HessianFlowError(f"a plan takes at most {MOST_EPOCHS} epochs, the run has {epochs}")
    examples = int(history.fact("examples_per_epoch"))
    rows = history.of_kind("batch")
    if rows:
        first = rows[0]["from"]
    elif history.epochs:
        first = history.epochs[0]["batch_size"]
    else:
        first = history.fact("reference_batch_size")
    changes = [(0, int(first))]
    for row in rows:
        # After a rollback, the same examples were trained again.
        while len(changes) > 1 and changes[-1][0] >= row["examples"]:
            changes.pop()
        changes.append((row["examples"], row["to"]))
    edges = sorted({*range(0, (epochs + 1) * examples, examples), *(at for at, _ in changes)})
    return [
        Phase(stop - start, next(size for at, size in reversed(changes) if at <= start))
        for start, stop in pairwise(edges)
    ]


def merged(phases: Iterable[Phase]) -> list[Phase]:
    """Return the phases with neighbours of one batch size merged, to be shown."""
    result: list[Phase] = []
    for phase in phases:
        if result and result[-1].batch_size == phase.batch_size:
            phase = Phase(result.pop().examples + phase.examples, phase.batch_size)
        result.append(phase)
    return result


def worker_counts(text: str) -> list[int]:
    """Return numbers of workers: "1..1024" doubles from the first to the last, "1,2,6" is a list.

    Raises:
        HessianFlowError: The text is neither, or holds a number below 1.
    """
    first, dots, last = text.partition("..")
    try:
        if dots:
            counts = _doubled(int(first), int(last))
        else:
            counts = [int(word) for word in text.split(",")]
    except ValueError:
        counts = []
    if min(counts, default=0) < 1:
        raise HessianFlowError(
            "--workers must be a range like 1..1024 or a list like 1,2,6 from 1 on, got"
            f" {shortened(text)}"
        )
    check_range("--workers", max(counts), 1, MOST)
    if len(counts) > MOST_COUNTS:
        raise HessianFlowError(
            f"--workers must hold at most {MOST_COUNTS} numbers, got {len(counts)}"
        )
    return sorted(set(counts))


def _doubled(low: int, high: int) -> list[int]:
    """Return low, 2 low, 4 low and so on, then high; nothing unless 1 <= low <= high."""
    if not 1 <= low <= high:
        return []
    counts = []
    while low < high:
        counts.append(low)
        low *= 2
    return [*counts, high]


def _here(config: RunConfig) -> str:
    device = torch.device(config.device)
    machine = f"{processor()}, threads: {torch.get_num_threads()}"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    return f"measured here: {config.model}, {config.precision}, {machine}"


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*:\s*(.*?)\s*$", text, re.MULTILINE)
    return platform.machine() if name is None else name[1]


def as_json(measured: Measured) -> dict[str, Any]:
    """Return the object that :func:`read_measured` reads."""
    line = measured.step_time
    ours = {"slope": line.slope, "intercept": line.intercept, "residual": line.residual}
    others = asdict(measured)
    del others["step_time"]
    return {**ours, **others}
