"""Thick-restart Lanczos with full reorthogonalisation, stopped by residuals of the wanted pairs.

References: Lanczos 1950; Golub and Van Loan, Matrix Computations, section 10; Wu and Simon,
Thick-restart Lanczos method for large symmetric eigenvalue problems, 2000; Davidson 1975 for a
start from several vectors.

A basis V with its products W = A V is kept. Each step projects (T = V^T W), takes the Ritz pairs
(theta, x = V s) of T, and extends V by the residual A x - theta x = W s - theta V s of the first
wanted pair that is not accurate yet, orthogonalised against all of V (no ghost copies). From one
start vector all residuals are parallel to the next Lanczos vector, so this is Lanczos; from several
it is the same idea on a block (Davidson without preconditioner). A full basis is compressed to its
best Ritz vectors, which costs no product (thick restart).

The rules for stopping are our choices. They are evidence, not proof;
experiments/benchmarks/curvature.md counts the failures.

- A pair is accepted when min(r, r^2/gap) <= tol |value| and r <= cap |value|, where r is its
  residual, gap the distance to the nearest other Ritz value less that one's residual, and cap =
  max(tol, min(0.01, sqrt(tol/10))). That some eigenvalue lies within r is a theorem; r^2/gap is its
  quadratic refinement (Temple, Kato). The cap keeps the search from trusting a gap that was
  estimated too early: with 0.03, values 17 % too low pass where three outliers are close.
- A Ritz value may stand for two close eigenvalues between which it lies. Its residual then falls
  only while the rest of the spectrum is damped, and stops at about half the distance of the two, or
  less if one of them has little part in the start. For k = 1, where nothing else is checked, the
  residual must therefore still be falling: what one more product would leave, r min(1, r /
  r_before), must be below Evidence.forecast sqrt(tol) |value|. On a net with a gap each product
  divides the residual by 2 to 10, and the rule costs little; with two values 1 % apart the search
  goes on until they separate (at tol = 1e-3, 11 of 300 searches then end outside the tolerance, and
  226 without the rule).
- The largest magnitude may lie at either end. For k = 1 the best value of the other sign must
  therefore be known well enough to lose; of a tie the positive one is returned, whatever the start.
- No residual can show that the value is the wanted one. The residual must therefore also be small
  beside the spread of the Ritz values, r <= SPREAD_SHARE (largest - smallest): near a multiple of
  the identity every vector has a small residual, and one product says nothing.
- A space from one start may hide one of several wanted eigenvalues (too small a part of it in the
  start, or a second one of equal value). For k > 1 the accepted pairs are therefore checked:
  Lanczos follows a fresh random vector in the complement of the space until its largest Ritz value
  plus REACH residuals stays below the last wanted value. If the wanted values change on the way,
  the search goes on and is checked again. For k = 1 this would double the cost of a search of a few
  products; there the residual must be small beside the gap to the next Ritz value (Evidence.angle).
- A residual at the rounding of products (RitzSpace.noise) ends the search whatever the tolerance,
  because more products could not make it smaller. `converged` then says whether the tolerance was
  met, by error bounds that are never below that rounding; the check also ignores differences below
  it.
- After a breakdown (all residuals at rounding level) the space is invariant, and the check is made
  for k = 1, too.
"""

import math

import torch
from torch import Tensor

from hessianflow.curvature.evidence import COLD, Demand, Evidence
from hessianflow.curvature.results import EigenResult, Which
from hessianflow.curvature.ritz_space import RitzSpace
from hessianflow.curvature.vectors import gaussian
from hessianflow.interfaces import LinearOperator

CHECK_STEPS = (5, 20)
"""Fewest and most products of one check. Our choice: with wanted and unwanted values 1 % apart, a
few percent of searches miss one with fewer than 5 products, and none of 60 did with 5. Where the
fifth value lies at the edge of a bulk, 20 products find both of two close values, 12 did not in 1 %
of searches; on networks the check ends earlier."""


def lanczos(
    operator: LinearOperator,
    k: int,
    *,
    which: Which,
    tol: float,
    max_matvecs: int,
    start: Tensor,
    source: torch.Generator,
    extra: int = 0,
    max_basis: int | None = None,
    evidence: Evidence = COLD,
    residual_tol: float = math.inf,
) -> EigenResult:
    """Return the k most wanted eigenpairs.

    :func:`~hessianflow.curvature.eigenpairs.top_eigenpairs` describes the other arguments.

    Args:
        start: start vectors, shape [size, s]; those that depend on earlier ones are left out.
        source: generator of the directions tried in a check or after a breakdown.
        max_basis: vectors (and products) kept at once. The default, max(2k + 20, 40), is our
            choice.
        evidence: bounds on the residuals.
    """
    # A restart must leave room for the fewest products of a check.
    least = k + extra + CHECK_STEPS[0] + 1
    demand = Demand(tol, evidence, residual_tol)
    capacity = max(max_basis or max(2 * k + 20, 40), least)
    space = RitzSpace(operator, which, k, k + extra, capacity, demand)
    seeds = list(start.unbind(1))
    while True:
        if space.is_complete:
            seeds.clear()  # the space holds all that they could add
        # No pair is accepted before all start vectors are in the space.
        accurate = not seeds and space.is_accurate()
        if accurate and (space.is_complete or (k == 1 and not space.is_invariant())):
            return space.result(converged=space.meets_demand())
        if space.is_complete or space.matvecs >= max_matvecs:
            return space.result(converged=False)
        if accurate:
            fresh = gaussian(operator, source)
            if _is_confirmed(space, max_matvecs, fresh) and space.is_accurate():
                return space.result(converged=space.meets_demand())
        elif seeds:
            space.extend(seeds.pop(0))
        elif not space.extend(space.direction()):
            # A breakdown: no residual leads out of the space, but a random vector does.
            space.extend(gaussian(operator, source))


def _is_confirmed(space: RitzSpace, max_matvecs: int, fresh: Tensor) -> bool:
    """Search the complement of the space from a fresh vector, and return whether nothing changed.

    The vectors enter the space, so no product is lost if a wanted value is found.
    """
    fewest, most = CHECK_STEPS
    settled = space.wanted
    # Room is made first: a restart on the way would mix the check's vectors with the others.
    most = min(most, space.make_room(most))
    first = space.size
    alive = space.extend(fresh)
    while alive and space.agrees_with(settled):
        steps = space.size - first
        if steps >= most or (steps >= fewest and space.is_unreached_since(first)):
            return True
        if space.matvecs >= max_matvecs:
            return False
        alive = space.extend(space.last_product)
    return space.agrees_with(settled)
