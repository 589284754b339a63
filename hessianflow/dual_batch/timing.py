"""The time models of a dual-batch run: given, recorded by the run that is resumed, or measured."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hessianflow.build import build_parts, on_this_machine
from hessianflow.config import RunConfig
from hessianflow.control import Stage, TimeModel, fit_time_model
from hessianflow.distributed.ray_session import connect
from hessianflow.dual_batch.workers import (
    StagePlan,
    all_stages,
    options_of,
    resources_of,
    worker_of,
)
from hessianflow.interfaces import HessianFlowError
from hessianflow.runs.documents import read_config

TIMED_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Batch sizes that are timed, as shares of the largest. This default is our choice."""
WARM_STEPS = 2
"""Steps of each size before the timed ones. This default is our choice."""
TIMED_STEPS = 7
"""Steps of each size whose median counts. This default is our choice."""


def time_worker(config: RunConfig, number: int) -> dict[int, list[tuple[int, float]]]:
    """Return (batch size, median seconds of a step) by resolution, of a model of its own here."""
    prepared = on_this_machine(config)
    parts = build_parts(prepared)
    stages = all_stages(prepared, parts)
    worker = worker_of(prepared, parts, StagePlan(stages, {}, {}), number)
    points: dict[int, list[tuple[int, float]]] = {}
    for stage in stages:
        own = points.setdefault(stage.level.resolution, [])
        if own:
            continue
        sizes = {max(1, round(share * stage.level.batch_size)) for share in TIMED_SHARES}
        for size in sorted(sizes):
            seconds = worker.measure(stage.start, size, WARM_STEPS + TIMED_STEPS)
            own.append((size, statistics.median(seconds[WARM_STEPS:])))
    return points


def times_of(config: RunConfig, stages: Sequence[Stage]) -> dict[int, TimeModel]:
    """Return the time model at each resolution, which is given, recorded or measured.

    Raises:
        HessianFlowError: Given times do not fit the resolutions, recorded ones are damaged, or
            measured ones make no line.
    """
    resolutions = sorted({stage.level.resolution for stage in stages})
    options = options_of(config)
    if options.slope is not None and options.intercept is not None:
        return _given_times(options.slope, options.intercept, resolutions)
    if config.run_dir is not None:
        recorded = read_config(Path(config.run_dir)).get("dual_batch")
        if recorded:
            source = f"{config.run_dir}/config.json"
            return _recorded_times(recorded.get("times", {}), resolutions, source)
    return _measured_times(config, resolutions)


def _measured_times(config: RunConfig, resolutions: Sequence[int]) -> dict[int, TimeModel]:
    """Return the time models of steps that are timed now."""
    if options_of(config).server == "ray":
        by_worker = _measured_together(config)
    else:
        by_worker = [time_worker(config, 0)]
    models = {}
    for resolution in resolutions:
        points = [point for of_worker in by_worker for point in of_worker[resolution]]
        sizes, seconds = zip(*points, strict=True)
        try:
            models[resolution] = fit_time_model(sizes, seconds)
        except HessianFlowError as error:
            raise HessianFlowError(
                f"at {resolution} pixels {error}, or give --controller.slope and"
                " --controller.intercept"
            ) from None
    return models


def _recorded_times(
    times: Mapping[str, Mapping[str, Any]], resolutions: Sequence[int], source: str
) -> dict[int, TimeModel]:
    """Return the time models that a run recorded; errors name the file by `source`."""
    models: dict[int, TimeModel] = {}
    for resolution in resolutions:
        try:
            models[resolution] = TimeModel(**times[str(resolution)])
        except (KeyError, TypeError):
            raise HessianFlowError(
                f"{source} holds no time model of {resolution} pixels: the file is damaged"
            ) from None
    return models


def _given_times(
    slope: Sequence[float], intercept: Sequence[float], resolutions: Sequence[int]
) -> dict[int, TimeModel]:
    for name, values in {"slope": slope, "intercept": intercept}.items():
        if len(values) != len(resolutions):
            raise HessianFlowError(
                f"--controller.{name} must hold one value for each of the resolutions"
                f" {list(resolutions)}, got {list(values)}"
            )
    lines = zip(resolutions, slope, intercept, strict=True)
    return {resolution: TimeModel(a, b) for resolution, a, b in lines}


def _measured_together(config: RunConfig) -> list[dict[int, list[tuple[int, float]]]]:
    """Return the times that each worker measures while all of them share memory and caches."""
    ray = connect(config.ray_address)
    resources = resources_of(config)
    task = ray.remote(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)(time_worker)
    measured: list[dict[int, list[tuple[int, float]]]] = ray.get(
        [task.remote(config, number) for number in range(options_of(config).workers)]
    )
    return measured
