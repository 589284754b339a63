"""Flat vectors: random ones, their norms, and their pieces in the shapes of parameters."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hessianflow.interfaces import HessianFlowError, LinearOperator


def generator(seed: int | None, device: torch.device) -> torch.Generator:
    """Return a new generator on `device`, seeded with `seed` or, if it is None, fresh entropy."""
    source = torch.Generator(device)
    if seed is None:
        source.seed()
    else:
        source.manual_seed(seed)
    return source


@contextmanager
def estimating(operator: LinearOperator) -> Iterator[None]:
    """Compute without graphs and in the operator's own precision, also if the caller uses autocast.

    Autocast would leave the inner products of an estimator 8 bits.
    """
    kind = operator.device.type
    with torch.no_grad():
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                yield
        else:
            yield


def gaussian(
    operator: LinearOperator, source: torch.Generator, columns: int | None = None
) -> Tensor:
    """Return standard normal entries (of variance 1), shape [size] or [size, columns]."""
    shape = _shape(operator, columns)
    return torch.randn(shape, generator=source, device=operator.device, dtype=operator.dtype)


def rademacher(
    operator: LinearOperator, source: torch.Generator, columns: int | None = None
) -> Tensor:
    """Return independent entries +1 or -1, shape [size] or [size, columns]."""
    shape = _shape(operator, columns)
    bits = torch.randint(0, 2, shape, generator=source, device=operator.device)
    return bits.to(operator.dtype).mul_(2).sub_(1)


def _shape(operator: LinearOperator, columns: int | None) -> tuple[int, ...]:
    if columns is None:
        return (operator.size,)
    return (operator.size, columns)


def usable_in_graph(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy of one made in inference mode, which cannot enter a graph."""
    if tensor.is_inference():
        return tensor.clone()
    return tensor


def norm(vector: Tensor) -> Tensor:
    """Return the Euclidean norm, also where squares of the entries leave the range of the type."""
    scale = vector.abs().amax().clamp_min(torch.finfo(vector.dtype).tiny)
    length: Tensor = torch.linalg.vector_norm(vector / scale) * scale
    return length


def normalised(vectors: Tensor) -> Tensor:
    """Return a vector, or each column of a matrix, divided by its Euclidean norm; 0 stays 0.

    Entries may be so large or small that their squares leave the range of the type.
    """
    tiny = torch.finfo(vectors.dtype).tiny
    largest = vectors.abs().amax(dim=0).clamp_min(tiny)
    # Dividing by the power of two at or below the largest entry changes no bit of a result whose
    # squares fit the type anyway. It is found on the host, because not every device has frexp and
    # callers wait for the device in any case.
    mantissa = torch.frexp(largest.cpu()).mantissa.to(largest)
    scaled = vectors / (largest / (2 * mantissa))
    unit: Tensor = scaled / torch.linalg.vector_norm(scaled, dim=0).clamp_min(tiny)
    return unit


def flatten(tensors: Sequence[Tensor | None], like: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return one flat vector; None stands for zeros in the shape of the same entry of `like`."""
    pieces = []
    for tensor, p in zip(tensors, like, strict=True):
        if tensor is None:
            tensor = torch.zeros_like(p)
        elif tensor.is_sparse:  # a gradient of a sparse embedding
            tensor = tensor.to_dense()
        pieces.append(tensor.reshape(-1).to(dtype))
    return torch.cat(pieces)


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of the flat vector with the shapes (and types) of `like`."""
    pieces = torch.split(vector, [p.numel() for p in like])
    return [piece.view(p.shape).to(p.dtype) for piece, p in zip(pieces, like, strict=True)]


def vector_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """Return the type of flat vectors: the widest of the parameters', and at least float32."""
    widest = torch.float32
    for parameter in parameters:
        widest = torch.promote_types(widest, parameter.dtype)
    return widest


def check_vector(operator: LinearOperator, vector: Tensor, name: str = "vector") -> None:
    """Raise HessianFlowError if a vector has another shape, type or device than the operator."""
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
