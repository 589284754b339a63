"""What a plan rests on: how long steps take, what is summed between workers, and the batches of the
run."""

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hessianflow.bounds import MOST, check_range, shortened
from hessianflow.build import Parts, build_parts
from hessianflow.choices import build_controller, build_optimizer
from hessianflow.config import RunConfig
from hessianflow.interfaces import HessianFlowError, Progress
from hessianflow.planning.performance import Phase, StepTime, fit_step_time, measure_steps
from hessianflow.runs import History
from hessianflow.runs.documents import read_measurement
from hessianflow.training.accumulate import GradientAccumulator

MOST_EPOCHS = 1_000_000
"""Epochs of a plan, which looks at each of them. Ours."""
MOST_COUNTS = 1000
"""Numbers of workers of one plan: each is a line of the table. Ours."""
REPEATS = 9
"""Steps of each size that the median is taken over. Ours."""


@dataclass(frozen=True)
class Measured:
    """What one worker takes, and what it would exchange.

    Attributes:
        step_time: of a microbatch.
        sizes: examples of the microbatches measured; empty where the line itself was given.
        seconds: their medians.
        update_seconds: of an optimizer step; None: unknown.
        gradient_bytes: of all gradients; None: unknown.
        source: where the step time comes from.
    """

    step_time: StepTime
    sizes: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    update_seconds: float | None = None
    gradient_bytes: int | None = None
    source: str = ""


@dataclass
class Run:
    """The run that is planned: settings, records where it has some, and a model that is built only
    when needed."""

    config: RunConfig
    history: History | None = None

    @cached_property
    def parts(self) -> Parts:
        """Model and data."""
        return build_parts(self.config)

    @cached_property
    def examples(self) -> int:
        """An epoch."""
        if self.history is not None:
            return int(self.history.fact("examples_per_epoch"))
        return self.config.train_examples or self.parts.train.num_examples

    @cached_property
    def gradient_bytes(self) -> int:
        """Of all weights, in float32, which is what is summed whatever the precision."""
        if self.history is not None:
            return 4 * int(self.history.fact("parameters"))
        return 4 * sum(p.numel() for p in self.parts.model.parameters() if p.requires_grad)


def read_measured(path: str) -> Measured:
    """Return figures from a JSON file: a plan.json, or an object with the keys of its "measured".

    Raises:
        HessianFlowError: no such file, no step times in it, or values of another type or out of
            bounds.
    """
    try:
        found = read_measurement(Path(path))
        sizes, seconds = tuple(found.get("sizes", ())), tuple(map(float, found.get("seconds", ())))
        line = (
            fit_step_time(sizes, seconds) if sizes else StepTime(found["slope"], found["intercept"])
        )
    except HessianFlowError as error:
        raise HessianFlowError(f"--measured {error}") from None
    source = f"{found.get('source', 'measured')} ({path})"
    return Measured(
        line, sizes, seconds, found.get("update_seconds"), found.get("gradient_bytes"), source
    )


def measure(run: Run, microbatch_size: int) -> Measured:
    """Time forward and backward passes of a few sizes, and the optimizer's step, on this
    machine."""
    config, parts = run.config, run.parts
    largest = min(microbatch_size, parts.train.num_examples)
    sizes = sorted(
        {max(1, largest // part) for part in (8, 4, 2, 1)} | ({2} if largest == 1 else set())
    )
    batches = {size: parts.train.sample(size, config.seed) for size in sizes}
    trained = [p for p in parts.model.parameters() if p.requires_grad]
    optimizer = build_optimizer(config, parts.model)
    precision = config.precision
    assert precision is not None, "prepared configurations have one"
    assert precision != "auto", "nor is it left to the machine"
    accumulate = GradientAccumulator(
        parts.model, nn.CrossEntropyLoss(), trained, precision=precision
    )

    def update(_: int) -> float:
        optimizer.step()
        return float(trained[0].detach().flatten()[0])  # waits for the device

    parts.model.train()
    seconds = measure_steps(
        lambda size: float(accumulate(batches[size]).loss), sizes, repeats=REPEATS
    )
    [update_seconds] = measure_steps(update, [1], repeats=REPEATS)
    return Measured(
        fit_step_time(sizes, seconds),
        tuple(sizes),
        tuple(seconds),
        update_seconds,
        run.gradient_bytes,
        _here(config),
    )


def planned_phases(run: Run) -> tuple[list[Phase], str]:
    """Return the batches of a run that has not been made, an epoch each, and how they are known.

    Raises:
        HessianFlowError: the controller decides from what only a run can measure.
    """
    config, controller = run.config, build_controller(run.config)
    epochs = config.epochs
    phases = []
    guessed = False
    for epoch in range(1, epochs + 1):
        phases.append(Phase(run.examples, controller.decision.batch_size))
        if controller.needs - {"eigenvalue"}:
            raise HessianFlowError(
                f"--controller {config.controller.name} decides from measurements of a run: name"
                " one it made with --run, or plan with --controller fixed"
            )
        guessed = guessed or "eigenvalue" in controller.needs
        progress = Progress(epoch, epoch * run.examples, 0, run.examples, epochs)
        if controller.is_due(progress):
            controller.update(progress)
    how = f"--controller {config.controller.name}"
    return phases, f"{how} growing by patience alone, for want of eigenvalues" if guessed else how


def recorded_phases(history: History, epochs: int) -> list[Phase]:
    """Return the batches that a run went through, cut at the ends of epochs; an interrupted run
    goes on as it stood."""
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
        # trained again after a rollback
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
    found: list[Phase] = []
    for phase in phases:
        if found and found[-1].batch_size == phase.batch_size:
            phase = Phase(found.pop().examples + phase.examples, phase.batch_size)
        found.append(phase)
    return found


def worker_counts(text: str) -> list[int]:
    """Return numbers of workers: "1..1024" doubles from the first to the last, "1,2,6" is a list.

    Raises:
        HessianFlowError: neither, or a number below 1.
    """
    first, dots, last = text.partition("..")
    try:
        if not dots:
            counts = [int(word) for word in text.split(",")]
        else:
            low, high = int(first), int(last)
            counts = [
                low * 2**power
                for power in range(max(1, high).bit_length())
                if low * 2**power < high
            ] + [high]
            counts = counts if 1 <= low <= high else [0]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
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


def _here(config: RunConfig) -> str:
    device = torch.device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    return f"measured here: {config.model}, {config.precision}, {name}{threads}"


def processor() -> str:
    """Return what this machine calls its processor."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [
        line.partition(":")[2].strip()
        for line in text.splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def as_json(measured: Measured) -> dict[str, Any]:
    """Return what :func:`read_measured` reads."""
    line = measured.step_time
    return {
        "sizes": list(measured.sizes),
        "seconds": list(measured.seconds),
        "slope": line.slope,
        "intercept": line.intercept,
        "residual": line.residual,
        "update_seconds": measured.update_seconds,
        "gradient_bytes": measured.gradient_bytes,
        "source": measured.source,
    }
