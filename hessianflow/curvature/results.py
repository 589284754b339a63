"""The frozen records that estimators return, with the shape of each tensor field."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Which = Literal["LM", "LA", "SA"]
"""The wanted eigenvalues: those of largest magnitude, the largest, or the smallest.

Of two values of either sign whose magnitudes agree within half the tolerance (but at most half a
percent) the positive one comes first, so that the sign does not depend on the start.
"""


@dataclass(frozen=True)
class EigenResult:
    """Eigenpairs of a symmetric operator, the most wanted first.

    Attributes:
        values: Rayleigh quotients of the operator itself, shape [k].
        vectors: orthonormal columns, shape [size, k].
        residuals: ||A v_i - values_i v_i||_2, [k]; a true eigenvalue lies within it of each value.
        error_bounds: largest distance of each value from a true eigenvalue, shape [k]. Without
            convergence this is the residual r_i, by a theorem. With convergence it is the larger of
            tol |values_i| and r_i^2 / gap_i, if that is below r_i: an estimate, because gap_i is
            the gap to the other values seen, and eigenvalues closer than `tol` count as one.
            Lanczos never reports less than the rounding of products, 50 machine epsilons of the
            largest magnitude.
        matvecs: products spent.
        converged: whether all wanted pairs met the tolerance, error_bounds_i <= tol |values_i|
            (power iteration: residuals_i of the deflated operator), and `residual_tol` if it was
            given, and Lanczos had its evidence, which is no proof, that no more wanted value is
            hidden (lanczos.py). A value below 2 machine epsilons of the largest magnitude is zero
            as far as products can tell, and counts as accurate.
        history: the leading value after each product.
        direction: residual of the leading pair, [size], along which Lanczos would have gone on.
    """

    values: Tensor
    vectors: Tensor = field(repr=False)
    residuals: Tensor
    error_bounds: Tensor
    matvecs: int
    converged: bool
    history: tuple[float, ...] = field(default=(), repr=False)
    direction: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class TraceResult:
    """A stochastic estimate of one number (trace, squared Frobenius norm, ...).

    Attributes:
        value: the estimate.
        stderr: its standard error over independent probes; 0 when the value is exact, infinite with
            a single probe. For the trace and the Frobenius norm it is widened for few probes, so
            that two of it cover 95 % where samples are roughly normal.
        matvecs: products spent.
        samples: the independent values whose spread gives `stderr`.
    """

    value: float
    stderr: float
    matvecs: int
    samples: tuple[float, ...] = ()


@dataclass(frozen=True)
class DiagonalResult:
    """A stochastic estimate of the diagonal.

    Attributes:
        values: the estimates, shape [size].
        stderr: standard error of each entry over the probes, shape [size].
        matvecs: products spent.
    """

    values: Tensor
    stderr: Tensor
    matvecs: int
