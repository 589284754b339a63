"""The JSON files of a run directory besides its history: the form of each, and its reader.

A reader returns {} or None if there is no file, and refuses a damaged file by a HessianFlowError
with the name and the value of the field that is wrong. Files may hold more than is listed here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypedDict, cast

from hessianflow.interfaces import HessianFlowError
from hessianflow.runs.files import read_object
from hessianflow.runs.names import CONFIG, ROBUSTNESS, SPECTRUM, SUMMARY
from hessianflow.runs.schema import Between, Count, Fault, Figure, Share, Size, fault_of

_MOST_NODES = 20_000
"""Most nodes of a spectral density; the command measures 120. This default is our choice."""
_MOST_SIZES = 1000
"""Most points of a fit of step times, whose cost grows with the number of pairs. This default is
our choice."""
_NotNegative = Annotated[float, Between(0, 1e100)]
_Positive = Annotated[float, Between(1e-100, 1e100)]


class TrainerFacts(TypedDict, total=False):
    """The facts about the trainer in config.json."""

    model: str
    parameters: Count
    optimizer: str
    parameter_groups: list[dict[str, Any]]
    controller: str | None
    adversary: str | None
    epochs: Size | None
    max_updates: Size
    max_examples: Size
    every_updates: Size
    every_examples: Size
    examples_per_epoch: Size | None
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
    """The form of config.json: settings of the command, facts of the trainer, and the machine."""

    settings: dict[str, Any]
    trainer: TrainerFacts
    environment: dict[str, Any]
    resolution_stages: list[_Stage]
    dual_batch: _DualBatch


class Summary(TypedDict, total=False):
    """The form of summary.json, which says how a run ended."""

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
    """The form of spectrum.json, made by `hessianflow spectrum`; null for what was not measured."""

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
    """The form of robustness.json: (accuracy, lower, upper limit) by attack and size."""

    eps: list[float]
    accuracy: dict[str, list[tuple[Share, Share, Share]]]


class Measurement(TypedDict, total=False):
    """Step times of one worker, which plan.json holds as "measured": points, or a fitted line."""

    sizes: list[Size]
    seconds: list[_Positive]
    slope: _Positive
    intercept: _NotNegative
    residual: Figure
    update_seconds: _NotNegative | None
    gradient_bytes: Size | None
    source: str


def read_config(run_dir: Path) -> Config:
    """Return the content of config.json of a run directory."""
    config = _read(run_dir / CONFIG, Config)
    for name in config.get("dual_batch", {}).get("times", {}):
        if not name.isdecimal():
            raise HessianFlowError(
                f"{run_dir / 'config.json'}: dual_batch.times must have a resolution as each key, "
                f"got {name[:40]!r}: the file is damaged"
            )
    return cast(Config, config)


def read_summary(run_dir: Path) -> Summary:
    """Return the content of summary.json of a run directory; {} while the run has not ended."""
    return cast(Summary, _read(run_dir / SUMMARY, Summary))


def read_spectrum(folder: Path) -> SpectrumFile | None:
    """Return the content of spectrum.json; None if there is no such file."""
    remedy = f"; make it again with `hessianflow spectrum {folder}`"
    spectrum = _read(folder / SPECTRUM, SpectrumFile, _spectrum_fault, remedy)
    return cast("SpectrumFile | None", spectrum or None)


def read_robustness(folder: Path) -> RobustnessFile | None:
    """Return the content of robustness.json; None if there is no such file."""
    remedy = f"; make it again with `hessianflow robustness {folder}`"
    robustness = _read(folder / ROBUSTNESS, RobustnessFile, _robustness_fault, remedy)
    return cast("RobustnessFile | None", robustness or None)


def read_measurement(path: Path) -> Measurement:
    """Return the step times that a plan.json, or an object like its "measured", holds.

    Raises:
        HessianFlowError: The file does not exist, is damaged, or holds no step times.
    """
    if not path.is_file():
        raise HessianFlowError(f"{path}: there is no such file")
    content = read_object(path)
    measured = content.get("measured", content)
    fault = fault_of(measured, Measurement)
    remedy = (
        "it must hold sizes and seconds (two lists of equal length), or slope and intercept, as"
        " plan.json does"
    )
    if fault is not None:
        raise HessianFlowError(f"{path}: {fault}: {remedy}")
    sizes = measured.get("sizes", [])
    if len(sizes) > _MOST_SIZES:
        raise HessianFlowError(f"{path}: sizes must be at most {_MOST_SIZES}, got {len(sizes)}")
    has_times = sizes or {"slope", "intercept"} <= measured.keys()
    if len(sizes) != len(measured.get("seconds", [])) or not has_times:
        raise HessianFlowError(f"{path}: {remedy}")
    return cast(Measurement, measured)


def _read(
    path: Path,
    form: Any,
    further: Callable[[Any], Fault | None] = lambda _content: None,
    remedy: str = "",
) -> Any:
    """Return a file after a check of its form and with `further`; {} if there is no file.

    The text `remedy` ends the error message.
    """
    if not path.is_file():
        return {}
    try:
        content = read_object(path)
    except HessianFlowError as error:
        raise HessianFlowError(f"{error}{remedy}") from None
    fault = fault_of(content, form) or further(content)
    if fault is not None:
        raise HessianFlowError(f"{path}: {fault}: the file is damaged{remedy}")
    return content


def _spectrum_fault(spectrum: SpectrumFile) -> Fault | None:
    values = len(spectrum["eigenvalues"])
    residuals = len(spectrum["residuals"])
    if residuals != values:
        return Fault("residuals", f"must hold {values} values, one an eigenvalue, got {residuals}")
    density = spectrum.get("density")
    if density is None:
        return None
    nodes = [len(row) for row in density["nodes"]]
    weights = [len(row) for row in density["weights"]]
    if sum(nodes) > _MOST_NODES:
        return Fault("density", f"must hold at most {_MOST_NODES} nodes, got {sum(nodes)}")
    if not nodes or len(set(nodes)) > 1 or nodes[0] == 0 or weights != nodes:
        return Fault("density", "must hold nodes and weights of one shape [probes, steps]")
    return None


def _robustness_fault(robustness: RobustnessFile) -> Fault | None:
    sizes = len(robustness["eps"])
    if not robustness["accuracy"] or not sizes:
        return Fault("accuracy", "must hold at least one attack and one eps")
    for name, triples in robustness["accuracy"].items():
        if len(triples) != sizes:
            words = f"must hold {sizes} values, one an eps, got {len(triples)}"
            return Fault(f"accuracy.{name}", words)
    return None
