"""Train like `hessianflow train`, then measure the Hessian at the checkpoints of some epochs.

    python -m experiments.spectra.measure SETTINGS.json RUN_DIR

SETTINGS.json holds the settings of `hessianflow train` and those of the measurement, see
grid.PRECISION. What was measured goes to RUN_DIR/measured.json: spectral densities by epoch, and
the loss along two lines through the final weights: the leading eigenvector (unit length), and a
random direction scaled filter by filter (Li et al., arXiv:1712.09913). All in batch statistics, on
the same training examples.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hessianflow as hf
from experiments.cells import MEASURED
from hessianflow.build import build_trainer
from hessianflow.config import from_dict
from hessianflow.curvature import loss_landscape
from hessianflow.parts import build_parts, prepare
from hessianflow.runs import checkpoints
from hessianflow.runs.documents import read_summary
from hessianflow.runs.names import BEST, CHECKPOINTS
from hessianflow.training import checkpoint

DIGITS = 5
"""Significant digits that are kept."""
SPANS = {"unit": 2.0, "filter": 1.0}


def main(settings_file: str, run_dir: str) -> int:
    """Train or continue, and measure; 0 on success."""
    settings, folder = json.loads(Path(settings_file).read_text("utf-8")), Path(run_dir)
    names = ("measured_after", "examples", "probes", "steps", "points")
    precision = {name: settings.pop(name) for name in names}
    config = prepare(from_dict({**settings, "run_dir": run_dir}, settings_file))
    if read_summary(folder).get("status") != "finished":
        trainer = build_trainer(config)
        if (folder / CHECKPOINTS).is_dir():
            trainer.resume(run_dir)
        else:
            trainer.fit()
    parts = build_parts(config)
    batch = parts.train.sample(min(precision["examples"], parts.train.num_examples), config.seed)
    operator = hf.curvature.HessianOperator(
        parts.model, nn.CrossEntropyLoss(), batch, norm_mode="batch"
    )
    densities = []
    for epoch, weights in _weights(folder, parts.train.num_examples).items():
        if epoch in precision["measured_after"]:
            checkpoint.load_model(parts.model, weights, f"epoch {epoch} of {run_dir}")
            densities.append({"epoch": epoch, **_density(operator, precision)})
    measured = {"densities": densities, "slices": _slices(operator, precision["points"])}
    (folder / MEASURED).write_text(json.dumps(measured), "utf-8")
    return 0


def _weights(folder: Path, examples_per_epoch: int) -> dict[int, Mapping[str, Any]]:
    """Of every epoch whose checkpoint was kept, in their order."""
    files = [file for file in (folder / CHECKPOINTS).glob("*.pt") if file.name != BEST]
    states = sorted(
        (checkpoints.load(file) for file in files), key=lambda state: int(state["examples"])
    )
    return {state["examples"] // examples_per_epoch: state["model"] for state in states}


def _density(
    operator: hf.curvature.HessianOperator, precision: Mapping[str, int]
) -> dict[str, Any]:
    density = hf.curvature.spectral_density(
        operator, num_probes=precision["probes"], steps=precision["steps"], seed=0
    )
    top = hf.curvature.top_eigenpairs(operator, which="LA", seed=0)
    return {
        "nodes": _rounded(density.nodes),
        "weights": _rounded(density.weights),
        "top": float(top.values[0]),
        "converged": top.converged,
        "shares": asdict(density.shares()),
        "loss": operator.mean_loss(),
    }


def _slices(operator: hf.curvature.HessianOperator, points: int) -> dict[str, Any]:
    """The loss along both lines, by how their directions are scaled."""
    leading = hf.curvature.top_eigenpairs(operator, which="LA", seed=0).vectors[:, 0]
    source = torch.Generator(operator.device).manual_seed(0)
    random = torch.randn(
        operator.size, generator=source, device=operator.device, dtype=operator.dtype
    )
    unit = loss_landscape(operator, leading, span=SPANS["unit"], points=points, normalise="unit")
    by_filter = loss_landscape(
        operator, random, span=SPANS["filter"], points=points, normalise="filter"
    )
    return {
        one.normalise: {"offsets": _rounded(one.offsets), "losses": _rounded(one.losses)}
        for one in (unit, by_filter)
    }


def _rounded(values: torch.Tensor) -> Any:
    """As (nested) lists of numbers with a few significant digits."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
