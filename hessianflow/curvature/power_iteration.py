"""Power iteration with deflation, as ABSA estimates its top eigenvalue (Yao et al., arXiv
1810.01021, official code).

v <- A v / ||A v||, theta = v^T A v; pairs found earlier are projected out of operator and vectors.

Deviations: the stopping rule is the residual ||A v - theta v|| <= tol |theta| instead of the change
of theta, which bounds no error (on a small MLP the error was 12 times the tolerance). The newest
value is reported, with no epsilon in the norm. The largest and smallest algebraic eigenvalues come
from a shift by the largest magnitude; values and residuals are those of the operator itself.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hessianflow.curvature.operator import NON_FINITE_PRODUCT, NonFiniteError
from hessianflow.curvature.results import EigenResult, Which
from hessianflow.curvature.vectors import norm
from hessianflow.interfaces import LinearOperator


def power_iteration(
    operator: LinearOperator, k: int, *, which: Which, tol: float, max_matvecs: int, start: Tensor
) -> EigenResult:
    """Return the k most wanted eigenpairs, from one start vector for each, shape [size, k].

    :func:`~hessianflow.curvature.eigenpairs.top_eigenpairs` describes the other arguments.
    """
    shift = 0.0
    spent = 0
    if which != "LM" and max_matvecs > 1:
        # Shifted by its spectral radius, the operator is definite and its largest magnitude is the
        # wanted end.
        budget = max(1, max_matvecs // 4)
        radius = _iterate(operator, start[:, 0], start[:, :0], 0.0, 0.1, budget)
        shift = 1.1 * abs(radius.value)
        if which == "SA":
            shift = -shift
        spent = radius.matvecs
    vectors = start[:, :0]
    pairs = []
    for column in start.unbind(1)[:k]:
        if spent >= max_matvecs:
            break
        pair = _iterate(operator, column, vectors, shift, tol, max_matvecs - spent)
        spent += pair.matvecs
        pairs.append(pair)
        vectors = torch.cat([vectors, pair.vector[:, None]], dim=1)
    values = vectors.new_tensor([pair.value for pair in pairs])
    residuals = vectors.new_tensor([pair.residual for pair in pairs])
    return EigenResult(
        values=values,
        vectors=vectors,
        residuals=residuals,
        error_bounds=residuals,
        matvecs=spent,
        converged=len(pairs) == k and all(pair.accurate for pair in pairs),
        history=pairs[0].history,
    )


@dataclass(frozen=True)
class _Pair:
    """One eigenpair: `residual` is the operator's own, `accurate` refers to the deflated one."""

    value: float
    vector: Tensor
    residual: float
    matvecs: int
    accurate: bool
    history: tuple[float, ...]


def _iterate(
    operator: LinearOperator, start: Tensor, known: Tensor, shift: float, tol: float, budget: int
) -> _Pair:
    """Return the leading pair of the shifted operator without the `known` columns."""
    following = start
    history: list[float] = []
    while True:
        following = following - known @ (known.T @ following)
        unit = following / norm(following)
        product = operator.matvec(unit)
        theta = unit @ product
        remainder = product - theta * unit
        within = remainder - known @ (known.T @ remainder)
        # One transfer per product: the stopping rule needs these numbers.
        value, residual, deflated = torch.stack([theta, norm(remainder), norm(within)]).tolist()
        if not math.isfinite(residual):
            raise NonFiniteError(NON_FINITE_PRODUCT)
        accurate = deflated <= tol * abs(value)
        history.append(value)
        if accurate or deflated == 0 or len(history) >= budget:
            return _Pair(value, unit, residual, len(history), accurate, tuple(history))
        following = product + shift * unit
