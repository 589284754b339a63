"""What the estimators return: frozen records, with the shape beside each tensor field."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Which = Literal["LM", "LA", "SA"]
"""Which eigenvalues: largest in magnitude, largest, or smallest algebraic.

Of two values of either sign whose magnitudes agree within half the tolerance (half a percent where
that is less) the positive one comes first, so that the sign does not hang on the start.
"""


@dataclass(frozen=True)
class EigenResult:
    """Eigenpairs of a symmetric operator, the most wanted first; printed without vectors and
    history.

    Attributes:
        values: Rayleigh quotients of the operator itself, shape [k].
        vectors: orthonormal columns, shape [size, k].
        residuals: ||A v_i - values_i v_i||_2, shape [k]. Each value lies within its residual of a
            true eigenvalue.
        error_bounds: how far each value may be from a true eigenvalue, shape [k]. The residual, a
            theorem, or where the search converged and that is more, tol |values_i| or r_i^2 /
            gap_i, whichever is larger: an estimate, as gap_i is that of the other values seen, and
            eigenvalues closer than `tol` are not told apart. Lanczos: at least the rounding of
            products, 50 machine epsilons of the largest magnitude.
        matvecs: products spent.
        converged: whether all wanted pairs met the tolerance, error_bounds_i <= tol |values_i|
            (Lanczos; for power iteration residuals_i, of the deflated operator), and `residual_tol`
            if it was given, and Lanczos had the evidence it asks for that none more wanted is
            hidden (lanczos.py says which; evidence, not proof). A value below 2 machine epsilons of
            the largest magnitude is zero as far as products can tell; it counts as met.
        history: the leading value after each product.
        direction: where the search would have gone on, the residual of the leading pair, shape
            [size]; Lanczos only.
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
        stderr: its standard error over independent probes (trace and Frobenius norm: widened for
            their small number, so that two cover 95 % where samples are roughly normal); 0 when the
            value is exact, infinite with a single probe.
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
        values: shape [size].
        stderr: standard error of each entry over the probes, shape [size].
        matvecs: products spent.
    """

    values: Tensor
    stderr: Tensor
    matvecs: int
