"""Trace, diagonal and Frobenius norm from products with random vectors.

References: Hutchinson 1989; Meyer, Musco, Musco, Woodruff, Hutch++: Optimal stochastic trace estimation, 2021
(algorithm 1); Bekas, Kokiopoulou, Saad, An estimator for the diagonal of a matrix, 2007.

Deviation from Hutch++: a third of the products goes into the sketch A S, as in the paper; then the share of A's energy
that the sketch misses is estimated from held-out columns. If it is a fifth or more, the low-rank part cannot pay for
itself and all remaining products go to plain probes (those of the sketch count as well). So a flat spectrum costs
nothing and a spectrum with outliers gains all.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from hessianflow.curvature.results import DiagonalResult, TraceResult
from hessianflow.curvature.vectors import generator, rademacher
from hessianflow.interfaces import HessianFlowError, LinearOperator

MISSED_ENERGY = 0.2
"""Share of energy outside the sketch from which on plain probes are better. Break-even is 1/3; ours, to be safe."""

TraceMethod = Literal["hutchpp", "hutchinson"]


def trace(
    operator: LinearOperator, *, num_matvecs: int, method: TraceMethod = "hutchpp", seed: int | None = None
) -> TraceResult:
    """The trace, tr A = E[g^T A g] for random signs g, with its standard error.

    Args:
        operator: any symmetric operator.
        num_matvecs: products to spend; all of them are. At least 2, for Hutch++ 6, or there is no standard error.
        method: "hutchpp" (default) removes the leading directions first, "hutchinson" averages plain probes.
        seed: None: fresh entropy.

    Returns:
        The estimate is unbiased. The standard error comes from the spread of independent probes (for Hutch++ given the
        sketch), so with few of them it is itself rough: with n probes, relative accuracy about 1 / sqrt(2 n).

    Raises:
        HessianFlowError: too few products, or an unknown method.
    """
    if method not in get_args(TraceMethod):
        raise HessianFlowError(f"method must be one of {', '.join(get_args(TraceMethod))}, got {method!r}")
    least = 2 if method == "hutchinson" else 6
    if num_matvecs < least:
        raise HessianFlowError(f"num_matvecs must be at least {least} for {method}, got {num_matvecs}")
    source = generator(seed, operator.device)
    with torch.no_grad():
        if method == "hutchinson":
            samples = [_quadratic_form(operator, rademacher(operator, source)) for _ in range(num_matvecs)]
            return _averaged(torch.stack(samples), 0.0, num_matvecs)
        return _hutchpp(operator, num_matvecs, source)


def _hutchpp(operator: LinearOperator, num_matvecs: int, source: torch.Generator) -> TraceResult:
    width = min(num_matvecs // 3, operator.size)
    probes = rademacher(operator, source, width)
    sketch = _product(operator, probes)
    if _missed_energy(sketch) >= MISSED_ENERGY and width < operator.size:
        plain = (probes * sketch).sum(dim=0)
        more = [_quadratic_form(operator, rademacher(operator, source)) for _ in range(num_matvecs - width)]
        return _averaged(torch.cat([plain, torch.stack(more)]), 0.0, num_matvecs)
    basis, _ = torch.linalg.qr(sketch)
    captured = float((basis * _product(operator, basis)).sum())
    samples = []
    for _ in range(num_matvecs - 2 * width):
        probe = rademacher(operator, source)
        samples.append(_quadratic_form(operator, probe - basis @ (basis.T @ probe)))
    return _averaged(torch.stack(samples), captured, num_matvecs)


def _missed_energy(sketch: Tensor) -> float:
    """Share of ||A s||^2 of columns that lies outside the span of all others, left out in up to 8 groups in turn."""
    _, small = torch.linalg.qr(sketch)  # the same angles in few rows
    missed, width = torch.zeros_like(small[0, 0]), small.shape[1]
    for group in torch.arange(width).tensor_split(min(width, 8)):
        others = torch.ones(width, dtype=torch.bool)
        others[group] = False
        basis, _ = torch.linalg.qr(small[:, others])
        held = small[:, ~others]
        missed += (held - basis @ (basis.T @ held)).square().sum()
    energy = float(small.square().sum())
    return float(missed) / energy if energy > 0 else 0.0


def diagonal(operator: LinearOperator, *, num_matvecs: int, seed: int | None = None) -> DiagonalResult:
    """The diagonal, diag A = E[g * (A g)] for random signs g, with the standard error of each entry.

    Raises:
        HessianFlowError: fewer than 2 products.
    """
    _check_probes(num_matvecs)
    source = generator(seed, operator.device)
    with torch.no_grad():
        mean = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
        squares = torch.zeros_like(mean)
        for n in range(1, num_matvecs + 1):  # Welford: one pass, no cancellation
            probe = rademacher(operator, source)
            sample = probe * operator.matvec(probe)
            deviation = sample - mean
            mean += deviation / n
            squares += deviation * (sample - mean)
    return DiagonalResult(mean, (squares / (num_matvecs - 1) / num_matvecs).sqrt(), num_matvecs)


def frobenius_norm(operator: LinearOperator, *, num_matvecs: int, seed: int | None = None) -> TraceResult:
    """The Frobenius norm, ||A||_F^2 = E[||A g||^2] for random signs g; standard error by the delta method.

    Raises:
        HessianFlowError: fewer than 2 products.
    """
    _check_probes(num_matvecs)
    source = generator(seed, operator.device)
    with torch.no_grad():
        samples = [operator.matvec(rademacher(operator, source)).square().sum() for _ in range(num_matvecs)]
    squared = _averaged(torch.stack(samples), 0.0, num_matvecs)
    value = squared.value**0.5
    return TraceResult(value, squared.stderr / (2 * value) if value > 0 else 0.0, num_matvecs, squared.samples)


def _check_probes(num_matvecs: int) -> None:
    if num_matvecs < 2:
        raise HessianFlowError(f"num_matvecs must be at least 2, got {num_matvecs}: one probe has no standard error")


def _product(operator: LinearOperator, columns: Tensor) -> Tensor:
    # Column by column: memory does not grow with the number of probes.
    return torch.stack([operator.matvec(column.contiguous()) for column in columns.unbind(1)], dim=1)


def _quadratic_form(operator: LinearOperator, vector: Tensor) -> Tensor:
    return torch.dot(vector, operator.matvec(vector))


def _averaged(samples: Tensor, offset: float, matvecs: int) -> TraceResult:
    values = samples.double()
    stderr = float(values.std() / len(values) ** 0.5)
    return TraceResult(offset + float(values.mean()), stderr, matvecs, tuple((offset + values).tolist()))
