"""Leading eigenpairs of any symmetric operator: one front door for Lanczos and power iteration."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from hessianflow.curvature.checks import check_count, check_search
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
        operator: anything with size, device, dtype and matvec.
        k: number of pairs, from 1 to the size.
        method: "lanczos" (thick restart, full reorthogonalisation) or "power" (deflated power
            iteration).
        which: "LM" largest magnitude, "LA" largest algebraic, "SA" smallest algebraic.
        tol: allowed relative error of each value. Lanczos judges it by min(r, r^2/gap) for the
            residual r, power iteration by r itself; neither by the change of a value. That no more
            wanted value is hidden, residuals cannot tell: Lanczos checks several pairs from a fresh
            start, and one by its gap and by whether its residual still falls; power iteration does
            not. Lanczos stops in any case at the rounding of products, taken as 50 machine epsilons
            of the largest magnitude (in float32 6e-6 of it): values much smaller than that one may
            be left less accurate than `tol` asks, and `converged` is False then. Default ours.
        residual_tol: largest residual of each pair, ||A x - theta x|| <= residual_tol |theta|, as
            ARPACK's `tol`; for those who need vectors. By `tol` alone Lanczos leaves residuals of
            up to sqrt(tol / 10) |theta| (1 % of it at most, but `tol` if that is more): such a
            vector is off by an angle of about that over the relative gap, good for a warm start or
            the share of a gradient along it, not for projections. None: not asked for. Not for
            "power", whose `tol` is such a rule already.
        max_matvecs: most products to spend; then `converged` is False. Default max(100, 20 k) for
            Lanczos, ten times as many for power iteration. Ours.
        v0: start vector [size] or vectors [size, m], e.g. those of an earlier, similar operator. A
            random part is added to the first, so that an eigenvector given as start cannot hide a
            larger eigenvalue.
        seed: of the random start; None: fresh entropy, every call starts elsewhere.
        extra: further pairs that Lanczos should return after the k wanted ones, at no product and
            however accurate.
        warm: whether `v0` sums up several vectors of a recent, similar operator, as CurvatureProbe
            makes it. Lanczos then accepts a larger residual where the estimated error allows it.

    Returns:
        values [k], vectors [size, k], residuals [k] (with `extra`, up to k + extra), products
            spent, and whether all k
        met the tolerance (EigenResult has the exact sense). Fewer pairs come back if `max_matvecs`
            allows no more.

    Raises:
        HessianFlowError: an argument out of range, or (NonFiniteError) a product with nan or inf.
    """
    budget = _check(operator, k, method, which, tol, max_matvecs, extra)
    _check_residual_tol(residual_tol, method)
    source = generator(seed, operator.device)
    start = _start(operator, v0, source)
    with estimating(operator):
        if method == "power":
            more = max(0, k - start.shape[1])
            start = torch.cat([start, gaussian(operator, source, more)], dim=1)
            return power_iteration(
                operator, k, which=which, tol=tol, max_matvecs=budget, start=start
            )
        return lanczos(
            operator,
            k,
            which=which,
            tol=tol,
            max_matvecs=budget,
            start=start,
            source=source,
            extra=extra,
            evidence=WARM if warm else COLD,
            residual_tol=math.inf if residual_tol is None else residual_tol,
        )


RANDOM_SHARE = 0.1
"""Length of the random part added to a given start vector, relative to it. Ours."""


def _start(operator: LinearOperator, v0: Tensor | None, source: torch.Generator) -> Tensor:
    noise = gaussian(operator, source, 1)
    if v0 is None:
        return noise
    given = v0[:, None] if v0.ndim == 1 else v0
    if given.ndim != 2 or given.shape[0] != operator.size or given.shape[1] < 1:
        raise HessianFlowError(
            f"v0 must have shape [{operator.size}] or [{operator.size}, m], got {list(v0.shape)}"
        )
    given = given.to(operator.device, operator.dtype)
    if not bool(torch.isfinite(given).all()) or not bool((given != 0).any(dim=0).all()):
        raise HessianFlowError(
            "v0 must be finite with no zero vector; leave it None for a random start"
        )
    given = normalised(given)
    first = given[:, :1] + noise * (RANDOM_SHARE / noise.norm())
    return torch.cat([first, given[:, 1:]], dim=1)


def _check_residual_tol(residual_tol: float | None, method: Method) -> None:
    if residual_tol is None:
        return
    if method == "power":
        raise HessianFlowError(
            "residual_tol is for 'lanczos'; 'power' stops by residuals: give tol"
        )
    if not residual_tol > 0:
        raise HessianFlowError(f"residual_tol must be positive or None, got {residual_tol}")


def _check(
    operator: LinearOperator,
    k: int,
    method: Method,
    which: Which,
    tol: float,
    max_matvecs: int | None,
    extra: int,
) -> int:
    """Refuse bad arguments; return the budget of products."""
    if method not in get_args(Method):
        raise HessianFlowError(
            f"method must be one of {', '.join(get_args(Method))}, got {method!r}"
        )
    check_search(k, which, tol, max_matvecs)
    check_count("extra", extra, 0)
    if k > operator.size:
        raise HessianFlowError(
            f"k must be between 1 and the operator's size {operator.size}, got {k}"
        )
    default = max(100, 20 * k) * (10 if method == "power" else 1)
    return default if max_matvecs is None else max_matvecs
