"""PyHessian as a second opinion: its eigenvalues, trace and density beside ours, on the same
weights and batch.

Reference: Yao, Gholami, Keutzer, Mahoney, PyHessian: Neural networks through the lens of the
Hessian, 2020; package pyhessian 0.1. It works on a copy of the model here, because it leaves a
model in evaluation mode, clears `.grad` and holds graphs in it; its random numbers come from a
forked state of the global generator.

What it cannot do is reported, not raised: its released `density()` calls `torch.eig`, which current
PyTorch no longer has; then the density is our quadrature of its products, and a note says so.
"""

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hessianflow.batches import move, num_examples
from hessianflow.curvature.density import SpectralDensity, spectral_density
from hessianflow.curvature.eigenpairs import top_eigenpairs
from hessianflow.curvature.hessian import HessianOperator
from hessianflow.curvature.operator import CallableOperator
from hessianflow.curvature.surroundings import second_order
from hessianflow.curvature.trace import trace
from hessianflow.curvature.vectors import flatten, unflatten
from hessianflow.interfaces import Batch, HessianFlowError, LossFn
from hessianflow.losses import mean_loss
from hessianflow.measuring import unwrap


@dataclass(frozen=True)
class Comparison:
    """One quantity by both; `theirs` and `difference` are None where PyHessian failed.

    Attributes:
        quantity: e.g. "eigenvalue 1".
        ours: our value.
        ours_error: residual or standard error of it.
        theirs: PyHessian's value.
        difference: |ours - theirs| / max(|ours|, |theirs|); for the density, of which the values
            are the means, the Wasserstein distance.
    """

    quantity: str
    ours: float
    ours_error: float
    theirs: float | None
    difference: float | None


@dataclass(frozen=True)
class SecondOpinion:
    """Both results side by side.

    Attributes:
        rows: one comparison a quantity.
        notes: what PyHessian could not do, and why.
        num_examples: examples in the batch.
    """

    rows: tuple[Comparison, ...]
    notes: tuple[str, ...]
    num_examples: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Return a table in plain text: every difference relative to the larger value, the distance
        of densities in a note."""
        lines = [
            f"{'quantity':<22}{'hessianflow':>14}{'+-':>11}{'PyHessian':>14}{'difference':>12}"
        ]
        notes = []
        for row in self.rows:
            error = "-" if math.isnan(row.ours_error) else f"{row.ours_error:.1e}"
            theirs = "failed" if row.theirs is None else f"{row.theirs:.6g}"
            difference = "-" if row.theirs is None else f"{_relative(row.ours, row.theirs):.2e}"
            lines.append(
                f"{row.quantity:<22}{row.ours:>14.6g}{error:>11}{theirs:>14}{difference:>12}"
            )
            if row.quantity.startswith("density") and row.difference is not None:
                notes.append(
                    f"the densities, of one probe each, lie {row.difference:.2e} apart (Wasserstein"
                    " distance, in units of the eigenvalues)"
                )
        lines.append(
            "+-: residual of an eigenvalue, standard error of the trace; difference: relative to"
            " the larger value"
        )
        return "\n".join([*lines, *(f"note: {note}" for note in (*notes, *self.notes))])


def second_opinion(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    *,
    k: int = 1,
    num_matvecs: int = 30,
    steps: int = 30,
    seed: int = 0,
) -> SecondOpinion:
    """Measure one batch with this toolkit and with PyHessian; the model is left exactly as found.

    Args:
        model: evaluated with running statistics (PyHessian knows no other way).
        loss_fn: loss_fn(outputs, targets).
        batch: one pair of tensors (inputs, targets).
        k: leading eigenvalues to compare.
        num_matvecs: products for the traces, of each library.
        steps: Lanczos steps for the densities, one probe of each library.
        seed: for both.

    Raises:
        HessianFlowError: PyHessian is not installed, or the batch is not a pair of tensors.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], Tensor)):
        raise HessianFlowError(
            "batch must be one pair (inputs, targets) of tensors: PyHessian takes nothing else"
        )
    operator = HessianOperator(model, loss_fn, (batch[0], batch[1]))
    pairs = top_eigenpairs(operator, k, seed=seed)
    traced = trace(operator, num_matvecs=num_matvecs, seed=seed)
    density = spectral_density(operator, num_probes=1, steps=steps, seed=seed)
    operator.release()
    notes: list[str] = []
    with _peer(model, loss_fn, batch, operator, seed) as peer:
        values = _attempt(
            lambda: peer.eigenvalues(maxIter=100, tol=1e-3, top_n=k)[0], "eigenvalues()", notes
        )
        samples = _attempt(lambda: peer.trace(maxIter=num_matvecs, tol=0.0), "trace()", notes)
        measure = _attempt(lambda: _density(peer, operator, steps, seed, notes), "density()", notes)
    rows = [
        _row(
            f"eigenvalue {i + 1}",
            float(pairs.values[i]),
            float(pairs.residuals[i]),
            None if values is None else float(values[i]),
        )
        for i in range(k)
    ]
    rows.append(
        _row(
            "trace",
            traced.value,
            traced.stderr,
            None if samples is None else float(np.mean(samples)),
        )
    )
    rows.append(_density_row(density, measure))
    return SecondOpinion(tuple(rows), tuple(notes), num_examples(batch))


@contextmanager
def _peer(
    model: nn.Module, loss_fn: LossFn, batch: Batch, operator: HessianOperator, seed: int
) -> Iterator[Any]:
    """PyHessian's object on a copy of the model, whose graphs are freed at the end."""
    try:
        from pyhessian import hessian
    except ImportError as error:
        raise HessianFlowError(
            f"PyHessian cannot be imported ({error}); pip install pyhessian"
        ) from error
    twin = copy.deepcopy(unwrap(model))
    device = operator.device
    forked = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(forked),
        torch.enable_grad(),
        warnings.catch_warnings(),
        second_order(twin),
    ):
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
        torch.manual_seed(seed)
        pair = (move(batch[0], device), move(batch[1], device))

        def criterion(outputs: Any, targets: Any) -> Tensor:
            return mean_loss(loss_fn, outputs, targets)

        try:
            yield hessian(twin, criterion, data=pair, cuda=device.type == "cuda")
        finally:
            for parameter in twin.parameters():
                parameter.grad = None  # breaks the cycle that keeps its graph alive


def _attempt(measure: Callable[[], Any], name: str, notes: list[str]) -> Any:
    """Return PyHessian's answer, or None and a note: whatever another library raises is a finding
    here."""
    try:
        return measure()
    except Exception as error:
        notes.append(f"PyHessian {name} failed: {_first_line(error)}")
        return None


def _density(
    peer: Any, operator: HessianOperator, steps: int, seed: int, notes: list[str]
) -> tuple[Tensor, Tensor, str]:
    try:
        nodes, weights = peer.density(iter=steps, n_v=1)
        return (
            torch.tensor(nodes[0]).real.double(),
            torch.tensor(weights[0]).real.double(),
            "density mean",
        )
    except (RuntimeError, AttributeError) as error:
        notes.append(
            f"PyHessian density() failed ({_first_line(error)}); * is our quadrature of its"
            " products"
        )
    from pyhessian.utils import hessian_vector_product

    def product(vector: Tensor) -> Tensor:
        pieces = unflatten(vector, peer.params)
        return flatten(
            hessian_vector_product(peer.gradsH, peer.params, pieces), peer.params, operator.dtype
        )

    theirs = CallableOperator(product, operator.size, operator.dtype, operator.device)
    # Another seed than ours: the same start would hide what the estimate owes to chance.
    rule = spectral_density(theirs, num_probes=1, steps=steps, seed=seed + 1)
    return rule.nodes[0], rule.weights[0], "density mean*"


def _density_row(ours: SpectralDensity, theirs: tuple[Tensor, Tensor, str] | None) -> Comparison:
    from scipy.stats import wasserstein_distance

    if theirs is None:
        return _row("density mean", ours.moment(1), float("nan"), None)
    nodes, weights, name = theirs
    distance = wasserstein_distance(
        ours.nodes[0].numpy(), nodes.numpy(), ours.weights[0].numpy(), weights.numpy()
    )
    return Comparison(
        name, ours.moment(1), float("nan"), float((nodes * weights).sum()), float(distance)
    )


def _row(quantity: str, ours: float, error: float, theirs: float | None) -> Comparison:
    return Comparison(
        quantity, ours, error, theirs, None if theirs is None else _relative(ours, theirs)
    )


def _relative(ours: float, theirs: float) -> float:
    scale = max(abs(ours), abs(theirs))
    return abs(ours - theirs) / scale if scale > 0 else 0.0


def _first_line(error: Exception) -> str:
    return re.split(r"[\n.](?:\s|$)", str(error).strip())[0] or type(error).__name__
