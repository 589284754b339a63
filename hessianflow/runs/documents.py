"""The JSON files of a run directory besides its history: what each holds, and its reader.

A reader returns {} or None where there is no file, and refuses a damaged file with the place and
the value that are wrong. Files may hold more than is listed here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypedDict, cast

from hessianflow.interfaces import HessianFlowError
from hessianflow.runs.files import read_object
from hessianflow.runs.names import CONFIG, ROBUSTNESS, SPECTRUM, SUMMARY
from hessianflow.runs.schema import Between, Count, Fault, Figure, Share, Size, fault_of

_MOST_NODES = 20_000
"""Most nodes of a spectral density; the command measures 120. Ours."""
_MOST_SIZES = 1000
"""Most points of a fit of step times, whose cost grows with the number of pairs. Ours."""
_NotNegative = Annotated[float, Between(0, 1e100)]
_Positive = Annotated[float, Between(1e-100, 1e100)]


class TrainerFacts(TypedDict, total=False):
    """What config.json holds about the trainer."""

    model: str
    parameters: Count
    optimizer: str
    controller: str | None
    adversary: str | None
    epochs: Size
    examples_per_epoch: Size
    reference_batch_size: Size
    microbatch_size: Size
    norm_batch_size: int | None
    precision: str | None
    device: str


class _Level(TypedDict):
    resolution: Size


class _Stage(TypedDict):
    start: Count
    level: _Level


class TimeLine(TypedDict, total=False):
    """A time model: seconds per step as a line over the batch size."""

    slope: _Positive
    intercept: _Positive
    residual: Figure
    smallest: Count
    largest: Count


class _Worker(TypedDict):
    small: bool


class _Plan(TypedDict):
    workers: list[_Worker]


class _DualBatch(TypedDict, total=False):
    times: dict[str, TimeLine]
    plans: dict[str, _Plan]


class Config(TypedDict, total=False):
    """config.json: settings of the command, facts of the trainer, and the machine."""

    settings: dict[str, Any]
    trainer: TrainerFacts
    environment: dict[str, Any]
    resolution_stages: list[_Stage]
    dual_batch: _DualBatch


class Summary(TypedDict, total=False):
    """summary.json: how a run ended."""

    status: str
    final_accuracy: Share
    best_accuracy: Share
    final_loss: Figure
    epochs: Count
    updates: Count
    examples: Count
    largest_batch: Size
    growths: Count
    wall_seconds: Figure
    seconds: dict[str, Figure]
    peak_memory_mib: Figure
    world_size: Count
    clock_seconds: Figure
    predicted_seconds: Figure


class _Estimate(TypedDict):
    value: Figure
    stderr: Figure


class _Limited(TypedDict):
    value: Share
    low: Share
    high: Share


class _Shares(TypedDict):
    negative: _Limited
    zero: _Limited
    positive: _Limited


class _DensityRequired(TypedDict):
    nodes: list[list[float]]
    weights: list[list[float]]


class _Density(_DensityRequired, total=False):
    shares: _Shares


class _LayerRequired(TypedDict):
    name: str
    eigenvalue: Figure


class Layer(_LayerRequired, total=False):
    """The curvature of one layer alone."""

    size: Count
    residual: Figure
    converged: bool
    trace: Figure
    trace_stderr: Figure


class _SpectrumRequired(TypedDict):
    eigenvalues: list[Figure]
    residuals: list[Figure]


class SpectrumFile(_SpectrumRequired, total=False):
    """spectrum.json: what `hessianflow spectrum` measured at a run's weights; null for the rest."""

    size: Count
    num_examples: Count
    norm_mode: str
    loss: Figure
    error_bounds: list[Figure]
    gradient_overlap: list[Figure]
    converged: bool
    trace: _Estimate | None
    density: _Density | None
    layers: list[Layer]
    matvecs: Count


class RobustnessFile(TypedDict):
    """robustness.json: for each attack, (accuracy, lower, upper limit) at each perturbation
    size."""

    eps: list[float]
    accuracy: dict[str, list[tuple[Share, Share, Share]]]


class Measurement(TypedDict, total=False):
    """Step times of one worker, as plan.json keeps them under "measured": points, or a line fit to
    them."""

    sizes: list[Size]
    seconds: list[_Positive]
    slope: _Positive
    intercept: _NotNegative
    residual: Figure
    update_seconds: _NotNegative | None
    gradient_bytes: Size | None
    source: str


def read_config(run_dir: Path) -> Config:
    """Return what config.json of a run directory holds.

    Raises:
        HessianFlowError: the file is damaged, or a part of it has another form.
    """
    found = _read(run_dir / CONFIG, Config)
    for name in found.get("dual_batch", {}).get("times", {}):
        if not name.isdecimal():
            raise HessianFlowError(
                f"{run_dir / 'config.json'}: dual_batch.times must have a resolution as each key, "
                f"got {name[:40]!r}: the file is damaged"
            )
    return cast(Config, found)


def read_summary(run_dir: Path) -> Summary:
    """Return what summary.json of a run directory holds; {} while the run has not ended.

    Raises:
        HessianFlowError: the file is damaged, or a part of it has another form.
    """
    return cast(Summary, _read(run_dir / SUMMARY, Summary))


def read_spectrum(folder: Path) -> SpectrumFile | None:
    """Return what spectrum.json holds; None without such a file.

    Raises:
        HessianFlowError: the file is damaged, or a part of it has another form.
    """
    path = folder / SPECTRUM
    remedy = f"; make it anew with `hessianflow spectrum {folder}`"
    found = _read(path, SpectrumFile, _spectrum_fault, remedy) if path.is_file() else None
    return cast("SpectrumFile | None", found)


def read_robustness(folder: Path) -> RobustnessFile | None:
    """Return what robustness.json holds; None without such a file.

    Raises:
        HessianFlowError: the file is damaged, or a part of it has another form.
    """
    path = folder / ROBUSTNESS
    remedy = f"; make it anew with `hessianflow robustness {folder}`"
    found = _read(path, RobustnessFile, _robustness_fault, remedy) if path.is_file() else None
    return cast("RobustnessFile | None", found)


def read_measurement(path: Path) -> Measurement:
    """Return the step times that a plan.json, or an object like its "measured", holds.

    Raises:
        HessianFlowError: no such file, a damaged one, or one without step times.
    """
    if not path.is_file():
        raise HessianFlowError(f"{path}: there is no such file")
    whole = read_object(path)
    found = whole.get("measured", whole)
    fault = fault_of(found, Measurement)
    remedy = (
        "it must hold sizes and seconds (two lists of equal length), or slope and intercept, as"
        " plan.json does"
    )
    if fault is not None:
        raise HessianFlowError(f"{path}: {fault}: {remedy}")
    sizes, seconds = found.get("sizes", []), found.get("seconds", [])
    if len(sizes) > _MOST_SIZES:
        raise HessianFlowError(f"{path}: sizes must be at most {_MOST_SIZES}, got {len(sizes)}")
    if len(sizes) != len(seconds) or not (sizes or {"slope", "intercept"} <= found.keys()):
        raise HessianFlowError(f"{path}: {remedy}")
    return cast(Measurement, found)


def _read(
    path: Path,
    form: Any,
    further: Callable[[Any], Fault | None] = lambda _found: None,
    remedy: str = "",
) -> Any:
    """Read a file, check its form, then check it with `further`; `remedy` ends the error
    message."""
    if not path.is_file():
        return {}
    try:
        found = read_object(path)
    except HessianFlowError as error:
        raise HessianFlowError(f"{error}{remedy}") from None
    fault = fault_of(found, form) or further(found)
    if fault is not None:
        raise HessianFlowError(f"{path}: {fault}: the file is damaged{remedy}")
    return found


def _spectrum_fault(found: SpectrumFile) -> Fault | None:
    values, residuals = found["eigenvalues"], found["residuals"]
    if len(residuals) != len(values):
        return Fault(
            "residuals", f"must hold {len(values)} values, one an eigenvalue, got {len(residuals)}"
        )
    density = found.get("density")
    if density is None:
        return None
    nodes = [len(row) for row in density["nodes"]]
    weights = [len(row) for row in density["weights"]]
    if sum(nodes) > _MOST_NODES:
        return Fault("density", f"must hold at most {_MOST_NODES} nodes, got {sum(nodes)}")
    if not nodes or len(set(nodes)) > 1 or nodes[0] == 0 or weights != nodes:
        return Fault("density", "must hold nodes and weights of one shape [probes, steps]")
    return None


def _robustness_fault(found: RobustnessFile) -> Fault | None:
    if not found["accuracy"] or not found["eps"]:
        return Fault("accuracy", "must hold at least one attack and one eps")
    for name, triples in found["accuracy"].items():
        if len(triples) != len(found["eps"]):
            words = f"must hold {len(found['eps'])} values, one an eps, got {len(triples)}"
            return Fault(f"accuracy.{name}", words)
    return None
