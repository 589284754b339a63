"""Flat vectors: where they come from, and how they map to a list of parameters."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from hessianflow.interfaces import HessianFlowError, LinearOperator


def generator(seed: int | None, device: torch.device) -> torch.Generator:
    """Return a generator of our own on `device`; the global ones stay untouched. None: fresh
    entropy."""
    made = torch.Generator(device)
    if seed is None:
        made.seed()
    else:
        made.manual_seed(seed)
    return made


@contextmanager
def estimating(operator: LinearOperator) -> Iterator[None]:
    """Compute without graphs and in the operator's own precision, also within an autocast of the
    caller's.

    Autocast would turn the inner products of an estimator into ones of 8 bits.
    """
    kind = operator.device.type
    widened = (
        torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    )
    with torch.no_grad(), widened:
        yield


def gaussian(
    operator: LinearOperator, source: torch.Generator, columns: int | None = None
) -> Tensor:
    """Return standard normal entries (unit variance, as everywhere in this package), shape [size]
    or [size, columns]."""
    shape = (operator.size,) if columns is None else (operator.size, columns)
    return torch.randn(shape, generator=source, device=operator.device, dtype=operator.dtype)


def rademacher(
    operator: LinearOperator, source: torch.Generator, columns: int | None = None
) -> Tensor:
    """Return independent entries +1 or -1, shape [size] or [size, columns]."""
    shape = (operator.size,) if columns is None else (operator.size, columns)
    bits = torch.randint(0, 2, shape, generator=source, device=operator.device)
    return bits.to(operator.dtype).mul_(2).sub_(1)


def norm(vector: Tensor) -> Tensor:
    """Return the Euclidean norm, also where squares of the entries leave the range of the type."""
    scale = vector.abs().amax().clamp_min(torch.finfo(vector.dtype).tiny)
    length: Tensor = torch.linalg.vector_norm(vector / scale) * scale
    return length


def normalised(vectors: Tensor) -> Tensor:
    """Return a vector, or each column of a matrix, divided by its Euclidean norm, whatever its
    size; zero stays zero."""
    tiny = torch.finfo(vectors.dtype).tiny
    largest = vectors.abs().amax(dim=0).clamp_min(tiny)
    # The power of two at or below the largest entry: where squares fit the type anyway, no bit of
    # the result changes. It is found on the host: not every device has frexp, and callers wait for
    # the device in any case.
    mantissa = torch.frexp(largest.cpu()).mantissa.to(largest)
    scaled = vectors / (largest / (2 * mantissa))
    unit: Tensor = scaled / torch.linalg.vector_norm(scaled, dim=0).clamp_min(tiny)
    return unit


def flatten(tensors: Sequence[Tensor | None], like: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return one flat vector; None stands for zeros of the shape of its neighbour in `like`."""
    pieces = [torch.zeros_like(p) if t is None else t for t, p in zip(tensors, like, strict=True)]
    # Gradients of sparse embeddings are sparse.
    return torch.cat(
        [(piece.to_dense() if piece.is_sparse else piece).reshape(-1).to(dtype) for piece in pieces]
    )


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of the flat vector with the shapes (and types) of `like`."""
    pieces = torch.split(vector, [p.numel() for p in like])
    return [piece.view(p.shape).to(p.dtype) for piece, p in zip(pieces, like, strict=True)]


def vector_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """Return the type of flat vectors: the widest of the parameters, and float32 for 16-bit
    ones."""
    widest = torch.float32
    for parameter in parameters:
        widest = torch.promote_types(widest, parameter.dtype)
    return widest


def check_vector(operator: LinearOperator, vector: Tensor, name: str = "vector") -> None:
    """Refuse a vector that does not fit the operator.

    Raises:
        HessianFlowError: wrong shape, type or device.
    """
    if vector.shape != (operator.size,):
        raise HessianFlowError(
            f"{name} must have shape [{operator.size}], got {list(vector.shape)}; pass it flat"
        )
    if vector.dtype != operator.dtype:
        raise HessianFlowError(
            f"{name} must be {operator.dtype}, got {vector.dtype}; convert with .to(operator.dtype)"
        )
    if vector.device.type != operator.device.type:
        raise HessianFlowError(
            f"{name} must be on {operator.device}, got {vector.device}; move it there"
        )
