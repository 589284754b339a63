"""A second opinion by PyHessian: eigenvalues, trace and density for the same weights and batch.

Reference: Yao, Gholami, Keutzer, Mahoney, PyHessian: Neural networks through the lens of the
Hessian, 2020; package pyhessian 0.1. PyHessian leaves a model in evaluation mode, clears `.grad`
and holds graphs in it, so it works on a copy here, with a forked random state.

Its failures are reported, not raised: its released `density()` calls `torch.eig`, which current
PyTorch no longer has. The density is then our quadrature of its products, and a note says so.
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

from hessianflow.batches import num_examples, to_device
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
    """One quantity by both libraries.

    Attributes:
        quantity: e.g. "eigenvalue 1".
        ours: our value; for the density its mean.
        ours_error: residual or standard error of our value.
        theirs: PyHessian's value; None where it failed.
        difference: |ours - theirs| / max(|ours|, |theirs|), None where PyHessian failed; for the
            density the Wasserstein distance.
    """

    quantity: str
    ours: float
    ours_error: float
    theirs: float | None
    difference: float | None


@dataclass(frozen=True)
class SecondOpinion:
    """The results of both libraries side by side.

    Attributes:
        rows: one comparison for each quantity.
        notes: failures of PyHessian and their causes.
        num_examples: examples in the batch.
    """

    rows: tuple[Comparison, ...]
    notes: tuple[str, ...]
    num_examples: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Return a table in plain text.

        All differences are relative to the larger value; a note gives the distance of densities.
        """
        text = [f"{'quantity':<22}{'hessianflow':>14}{'+-':>11}{'PyHessian':>14}{'difference':>12}"]
        text += map(_line, self.rows)
        notes = [
            f"the densities, of one probe each, lie {row.difference:.2e} apart (Wasserstein"
            " distance, in units of the eigenvalues)"
            for row in self.rows
            if row.quantity.startswith("density") and row.difference is not None
        ]
        text.append(
            "+-: residual of an eigenvalue, standard error of the trace; difference: relative to"
            " the larger value"
        )
        return "\n".join([*text, *(f"note: {note}" for note in (*notes, *self.notes))])


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
    """Measure one batch with this toolkit and with PyHessian, and leave the model unchanged.

    Args:
        model: the model, evaluated with running statistics (PyHessian knows no other way).
        loss_fn: loss_fn(outputs, targets).
        batch: one pair of tensors (inputs, targets).
        k: leading eigenvalues to compare.
        num_matvecs: products that each library spends on the trace.
        steps: Lanczos steps that each library spends on the density, from one probe.
        seed: seed of both libraries.

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
    theirs: list[float | None] = [None] * k
    if values is not None:
        theirs = [float(value) for value in values]
    rows = [
        _row(f"eigenvalue {i + 1}", float(pairs.values[i]), float(pairs.residuals[i]), theirs[i])
        for i in range(k)
    ]
    their_trace = None
    if samples is not None:
        their_trace = float(np.mean(samples))
    rows.append(_row("trace", traced.value, traced.stderr, their_trace))
    rows.append(_density_row(density, measure))
    return SecondOpinion(tuple(rows), tuple(notes), num_examples(batch))


@contextmanager
def _peer(
    model: nn.Module, loss_fn: LossFn, batch: Batch, operator: HessianOperator, seed: int
) -> Iterator[Any]:
    """Yield PyHessian's object for a copy of the model, and free its graphs at the end."""
    try:
        from pyhessian import hessian
    except ImportError as error:
        raise HessianFlowError(
            f"PyHessian cannot be imported ({error}); pip install pyhessian"
        ) from error
    twin = copy.deepcopy(unwrap(model))
    device = operator.device
    forked = []
    if device.type == "cuda":
        forked.append(device)
    with (
        torch.random.fork_rng(forked),
        torch.enable_grad(),
        warnings.catch_warnings(),
        second_order(twin),
    ):
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
        torch.manual_seed(seed)
        pair = (to_device(batch[0], device), to_device(batch[1], device))

        def criterion(outputs: Any, targets: Any) -> Tensor:
            return mean_loss(loss_fn, outputs, targets)

        try:
            yield hessian(twin, criterion, data=pair, cuda=device.type == "cuda")
        finally:
            for parameter in twin.parameters():
                parameter.grad = None  # breaks the cycle that keeps its graph alive


def _attempt(measure: Callable[[], Any], name: str, notes: list[str]) -> Any:
    """Return PyHessian's answer, or None with a note of the failure."""
    try:
        return measure()
    # Another library may raise anything, and that it failed is a result here.
    except Exception as error:
        notes.append(f"PyHessian {name} failed: {_first_line(error)}")
        return None


def _density(
    peer: Any, operator: HessianOperator, steps: int, seed: int, notes: list[str]
) -> tuple[Tensor, Tensor, str]:
    try:
        measured = peer.density(iter=steps, n_v=1)
        nodes, weights = (torch.tensor(of_probes[0]).real.double() for of_probes in measured)
        return nodes, weights, "density mean"
    except (RuntimeError, AttributeError) as error:
        notes.append(
            f"PyHessian density() failed ({_first_line(error)}); * is our quadrature of its"
            " products"
        )
    from pyhessian.utils import hessian_vector_product

    def product(vector: Tensor) -> Tensor:
        pieces = unflatten(vector, peer.params)
        image = hessian_vector_product(peer.gradsH, peer.params, pieces)
        return flatten(image, peer.params, operator.dtype)

    theirs = CallableOperator(product, operator.size, operator.dtype, operator.device)
    # The seed differs from ours: the same start would hide the error that is due to chance.
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
    mean = float((nodes * weights).sum())
    return Comparison(name, ours.moment(1), math.nan, mean, float(distance))


def _row(quantity: str, ours: float, error: float, theirs: float | None) -> Comparison:
    difference = None
    if theirs is not None:
        difference = _relative(ours, theirs)
    return Comparison(quantity, ours, error, theirs, difference)


def _line(row: Comparison) -> str:
    error = "-"
    if not math.isnan(row.ours_error):
        error = f"{row.ours_error:.1e}"
    theirs = "failed"
    difference = "-"
    if row.theirs is not None:
        theirs = f"{row.theirs:.6g}"
        difference = f"{_relative(row.ours, row.theirs):.2e}"
    return f"{row.quantity:<22}{row.ours:>14.6g}{error:>11}{theirs:>14}{difference:>12}"


def _relative(ours: float, theirs: float) -> float:
    scale = max(abs(ours), abs(theirs))
    if scale == 0:
        return 0.0
    return abs(ours - theirs) / scale


def _first_line(error: Exception) -> str:
    return re.split(r"[\n.](?:\s|$)", str(error).strip())[0] or type(error).__name__
