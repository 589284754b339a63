"""Matrices with their singular values brought near 1, by the iteration of Muon.

Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein, "Muon: an optimizer for hidden layers in
neural networks", 2024 (kellerjordan.github.io/posts/muon), in which U diag(s) V' becomes
approximately U V'. With X = G / |G|_F, transposed first if G has more rows than columns, five
times

    X <- a X + (b A + c A A) X,   A = X X',   (a, b, c) = (3.4445, -4.7750, 2.0315),

after which singular values lie between about 0.7 and 1.2, but for those that were tiny.

Every step multiplies X from the left by a polynomial of A, and polynomials of A commute. A matrix
at least twice as long as it is high is therefore multiplied once, at the end, by the product Q of
all polynomials, and the iteration itself runs on the small squares A and Q:

    P = a I + b A + c A A,   Q <- P Q,   A <- P A P.

This is exact but for rounding. In float32 the difference is about 1e-3 of the result where singular
values span six powers of ten, against 0.3 from an iteration in bfloat16; convolutions of ResNet-20
take 0.4 times the time. It is not used in bfloat16, where `torch.optim.Muon` is matched bit for
bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The numbers a, b, c of the iteration, those of the authors and of torch."""
STEPS = 5
"""Steps of the iteration, as many as the authors and torch take."""
EPS = 1e-7
"""Smallest norm that a matrix is divided by, so that zeros stay zeros; that of torch."""
MOST_TOGETHER = 2**24
"""Most numbers in matrices that are multiplied together. This default is our choice: products of
this size fill any device, and further copies would only take memory."""


def orthogonalised(matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the matrices with singular values near 1; zeros stay zeros.

    Args:
        matrices: Matrices of one shape, type and device.
        dtype: Type in which to compute.

    Returns:
        New matrices of the type of the given ones. Numbers that are not finite make all of their
        own matrix NaN, and no other.
    """
    together = max(1, MOST_TOGETHER // matrices[0].numel())
    found: list[Tensor] = []
    for start in range(0, len(matrices), together):
        batch = torch.stack([each.to(dtype) for each in matrices[start : start + together]])
        found += _of_batch(batch).to(matrices[0].dtype).unbind()
    return found


def _of_batch(batch: Tensor) -> Tensor:
    """Return the result for a batch of matrices, shape [count, rows, columns]."""
    rows, columns = batch.shape[1:]
    if rows > columns:
        return _of_batch(batch.mT).mT
    unit = batch / torch.linalg.vector_norm(batch, dim=(1, 2), keepdim=True).clamp(min=EPS)
    if batch.dtype == torch.bfloat16 or columns < 2 * rows:
        return _iterated(unit)
    return _iterated_on_squares(unit)


def _iterated(matrices: Tensor) -> Tensor:
    """Return the matrices after all steps, by the operations of torch in their order."""
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = matrices @ matrices.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        matrices = torch.baddbmm(matrices, polynomial, matrices, beta=a)
    return matrices


def _iterated_on_squares(matrices: Tensor) -> Tensor:
    """Return the matrices after all steps, of which none but the last touches them."""
    a, b, c = COEFFICIENTS
    square = matrices @ matrices.mT
    product = torch.eye(len(square[0]), dtype=square.dtype, device=square.device)
    for step in range(STEPS):
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial @ product
        if step < STEPS - 1:
            square = polynomial @ square @ polynomial
    return product @ matrices
