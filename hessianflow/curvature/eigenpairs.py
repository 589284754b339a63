"""Leading eigenpairs of any symmetric operator, by Lanczos or by power iteration."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from hessianflow.checks import check_choice, check_count
from hessianflow.curvature.checks import check_search
from hessianflow.curvature.evidence import COLD, WARM
from hessianflow.curvature.lanczos import lanczos
from hessianflow.curvature.power_iteration import power_iteration
from hessianflow.curvature.results import EigenResult, Which
from hessianflow.curvature.vectors import estimating, gaussian, generator, normalised
from hessianflow.interfaces import HessianFlowError, LinearOperator

Method = Literal["lanczos", "power"]


def top_eigenpairs(
    operator: LinearOperator,
    k: int = 1,
    *,
    method: Method = "lanczos",
    which: Which = "LM",
    tol: float = 1e-3,
    residual_tol: float | None = None,
    max_matvecs: int | None = None,
    v0: Tensor | None = None,
    seed: int | None = None,
    extra: int = 0,
    warm: bool = False,
) -> EigenResult:
    """Return the k leading eigenpairs of a symmetric operator, from products alone.

    Args:
        operator: any object with size, device, dtype and matvec.
        k: number of pairs, from 1 to the size.
        method: "lanczos" (thick restart, full reorthogonalisation) or "power" (with deflation).
        which: "LM" largest magnitude, "LA" largest algebraic, "SA" smallest algebraic.
        tol: allowed relative error of each value; the default is our choice. Lanczos judges it by
            min(r, r^2/gap) for the residual r, power iteration by r itself, neither by the change
            of a value. Residuals cannot show that a more wanted value is hidden. Lanczos checks
            several pairs from a fresh start, and a single pair by its gap and by whether its
            residual still falls; power iteration does not check. Lanczos never asks for less than
            the rounding of products, taken as 50 machine epsilons of the largest magnitude (in
            float32 6e-6 of it): much smaller values may be less accurate than `tol` asks, and
            `converged` is then False.
        residual_tol: largest residual of each pair, ||A x - theta x|| <= residual_tol |theta|, like
            ARPACK's `tol`; None sets no limit. Use it where vectors matter: by `tol` alone Lanczos
            leaves residuals of up to sqrt(tol / 10) |theta| (1 % of it at most, but `tol` if that
            is more). Such a vector is off by an angle of about that over the relative gap, good
            enough for a warm start or the share of a gradient along it, not for projections.
            "power" refuses it, because its `tol` is such a rule already.
        max_matvecs: most products to spend; a search that needs more ends with `converged` False.
            The default is our choice: max(100, 20 k), for power iteration ten times that.
        v0: start vector [size] or vectors [size, m], e.g. those of an earlier, similar operator. A
            random part is added to the first, so that it cannot hide a larger eigenvalue.
        seed: seed of the random start; None draws fresh entropy.
        extra: number of further pairs, however accurate, that Lanczos returns for no product more.
        warm: whether `v0` sums up several vectors of a recent, similar operator, as CurvatureProbe
            makes it. Lanczos then accepts a larger residual where the estimated error allows it.

    Returns:
        The k pairs, for Lanczos up to k + extra (fewer if `max_matvecs` allows no more), and
        whether all k met the tolerance; :class:`EigenResult` gives the exact meaning.

    Raises:
        HessianFlowError: an argument is out of range, or (NonFiniteError) a product is not finite.
    """
    budget = _check(operator, k, method, which, tol, residual_tol, max_matvecs, extra)
    source = generator(seed, operator.device)
    start = _start(operator, v0, source)
    with estimating(operator):
        if method == "power":
            more = max(0, k - start.shape[1])
            start = torch.cat([start, gaussian(operator, source, more)], dim=1)
            return power_iteration(
                operator, k, which=which, tol=tol, max_matvecs=budget, start=start
            )
        evidence = COLD
        if warm:
            evidence = WARM
        return lanczos(
            operator,
            k,
            which=which,
            tol=tol,
            max_matvecs=budget,
            start=start,
            source=source,
            extra=extra,
            evidence=evidence,
            residual_tol=residual_tol or math.inf,
        )


RANDOM_SHARE = 0.1
"""Length of the random part added to a start vector, relative to that vector. Our choice."""


def _start(operator: LinearOperator, v0: Tensor | None, source: torch.Generator) -> Tensor:
    """Return the start vectors as columns, the first of them with a random part."""
    noise = gaussian(operator, source, 1)
    if v0 is None:
        return noise
    columns = v0
    if v0.ndim == 1:
        columns = v0[:, None]
    if columns.ndim != 2 or columns.shape[0] != operator.size or columns.shape[1] < 1:
        raise HessianFlowError(
            f"v0 must have shape [{operator.size}] or [{operator.size}, m], got {list(v0.shape)}"
        )
    columns = columns.to(operator.device, operator.dtype)
    if not bool(torch.isfinite(columns).all()) or not bool((columns != 0).any(dim=0).all()):
        raise HessianFlowError("v0 must be finite with no zero vector; None gives a random start")
    columns = normalised(columns)
    first = columns[:, :1] + noise * (RANDOM_SHARE / noise.norm())
    return torch.cat([first, columns[:, 1:]], dim=1)


def _check(
    operator: LinearOperator,
    k: int,
    method: Method,
    which: Which,
    tol: float,
    residual_tol: float | None,
    max_matvecs: int | None,
    extra: int,
) -> int:
    """Refuse bad arguments, and return the budget of products."""
    check_choice("method", method, get_args(Method))
    check_search(k, which, tol, max_matvecs)
    check_count("extra", extra, 0)
    if k > operator.size:
        raise HessianFlowError(
            f"k must be between 1 and the operator's size {operator.size}, got {k}"
        )
    if residual_tol is not None and method == "power":
        raise HessianFlowError(
            "residual_tol is for 'lanczos'; 'power' stops by residuals: give tol"
        )
    if residual_tol is not None and not residual_tol > 0:
        raise HessianFlowError(f"residual_tol must be positive or None, got {residual_tol}")
    if max_matvecs is not None:
        return max_matvecs
    if method == "power":
        return 10 * max(100, 20 * k)
    return max(100, 20 * k)
