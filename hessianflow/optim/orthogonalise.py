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

    B = b A + c A A,   Q <- (a I + B) Q,   A <- (a I + B) A (a I + B).

Squares of one size go together, whatever the length of the matrices that they are of, and the norm
of a matrix is the root of the trace of its square. This is exact but for rounding: in float32 the
difference is about 1e-3 of the result where singular values span six powers of ten, against 0.3
from an iteration in bfloat16. It is not used in bfloat16, where `torch.optim.Muon` is matched bit
for bit.
"""

from collections.abc import Iterator, Sequence

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
        matrices: Matrices of one type and device, of any shapes.
        dtype: Type in which to compute.

    Returns:
        New matrices of the type of the given ones, in their order. Numbers that are not finite make
        all of their own matrix NaN, and no other.
    """
    found: dict[int, Tensor] = {}
    for portion in _portions(matrices):
        batches = [torch.stack([matrices[index] for index in alike]).to(dtype) for alike in portion]
        for alike, batch in zip(portion, _of_batches(batches), strict=True):
            found |= zip(alike, batch.to(matrices[0].dtype).unbind(), strict=True)
    return [found[index] for index in range(len(matrices))]


def _portions(matrices: Sequence[Tensor]) -> Iterator[list[list[int]]]:
    """Yield as many matrices as go together, by their numbers, in lists of one shape each."""
    by_shape: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(index)
    portion: list[list[int]] = []
    held = 0
    for shape, alike in by_shape.items():
        most = max(1, MOST_TOGETHER // shape.numel())
        for start in range(0, len(alike), most):
            part = alike[start : start + most]
            if portion and held + len(part) * shape.numel() > MOST_TOGETHER:
                yield portion
                portion = []
                held = 0
            portion.append(part)
            held += len(part) * shape.numel()
    yield portion


def _of_batches(batches: Sequence[Tensor]) -> list[Tensor]:
    """Return the results for batches of matrices, each of shape [count, rows, columns]."""
    wide = [_wide(batch, batch) for batch in batches]
    found: dict[int, Tensor] = {}
    by_rows: dict[int, list[int]] = {}
    for number, batch in enumerate(wide):
        _, rows, columns = batch.shape
        if batch.dtype == torch.bfloat16 or columns < 2 * rows:
            found[number] = _iterated(batch)
        else:
            by_rows.setdefault(rows, []).append(number)
    for numbers in by_rows.values():
        squares = [torch.bmm(wide[number], wide[number].mT) for number in numbers]
        products = torch.split(_product(torch.cat(squares)), [len(each) for each in squares])
        for number, product in zip(numbers, products, strict=True):
            found[number] = torch.bmm(product, wide[number])
    return [_wide(found[number], batch) for number, batch in enumerate(batches)]


def _wide(matrices: Tensor, like: Tensor) -> Tensor:
    """Return the matrices, transposed if `like` has more rows than columns."""
    if like.shape[1] > like.shape[2]:
        return matrices.mT
    return matrices


def _iterated(matrices: Tensor) -> Tensor:
    """Return the matrices after all steps, by the operations of torch in their order."""
    a, b, c = COEFFICIENTS
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp(min=EPS)
    matrices = matrices / norms
    for _ in range(STEPS):
        square = torch.bmm(matrices, matrices.mT)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        matrices = torch.baddbmm(matrices, polynomial, matrices, beta=a)
    return matrices


def _product(square: Tensor) -> Tensor:
    """Return the product of the polynomials of all steps, divided by the norms of the matrices.

    Args:
        square: Squares A of the matrices before they are divided by their norms.
    """
    a, b, c = COEFFICIENTS
    norms = square.diagonal(dim1=1, dim2=2).sum(1).sqrt().clamp(min=EPS)[:, None, None]
    square = square / norms.square()
    product = torch.eye(square.shape[1], dtype=square.dtype, device=square.device) / norms
    for step in range(STEPS):
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        product = torch.baddbmm(product, polynomial, product, beta=a)
        if step < STEPS - 1:
            square = torch.baddbmm(square, polynomial, square, beta=a)
            square = torch.baddbmm(square, square, polynomial, beta=a)
    return product
