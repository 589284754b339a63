"""Problems with known answers, shared by the tests and the benchmarks: matrices from a spectrum,
small trained nets."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hessianflow.curvature import CallableOperator
from hessianflow.data import DeviceBatches


def symmetric(
    spectrum: Iterable[float], seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """A dense symmetric matrix with exactly this spectrum, in a random orthonormal basis."""
    values = torch.tensor(list(spectrum), dtype=torch.float64)
    source = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=source, dtype=torch.float64)
    )
    return ((basis * values) @ basis.T).to(dtype)


def operator_of(matrix: Tensor) -> CallableOperator:
    """The matrix as products only."""
    return CallableOperator(lambda v: matrix @ v, len(matrix), matrix.dtype, matrix.device)


def clustered(n: int = 60) -> list[float]:
    """A few separate outliers above and below a bulk near zero, as in trained nets."""
    return [10.0, 6.0, 5.9, -3.0, *torch.linspace(-0.1, 0.4, n - 4).tolist()]


def bright_or_dark(
    count: int, batch_size: int = 8, shape: Sequence[int] = (1, 4, 4), **options: Any
) -> DeviceBatches:
    """Batches of random images whose class is whether they are bright: always the same images.

    Args:
        count: images.
        batch_size: of the batches.
        shape: of an image.
        options: further ones of :class:`DeviceBatches`.
    """
    source = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, *shape), generator=source, dtype=torch.uint8)
    targets = images.float().mean((1, 2, 3)).gt(127).long()
    return DeviceBatches(images, targets, batch_size, **options)


@dataclass
class Problem:
    """A model, its loss, and one batch."""

    model: nn.Module
    loss_fn: Any
    inputs: Any
    targets: Any

    @property
    def pair(self) -> tuple[Any, Any]:
        return self.inputs, self.targets


def classification(
    model: nn.Module,
    shape: Sequence[int],
    examples: int,
    classes: int = 10,
    seed: int = 0,
    noise: float = 2.0,
) -> Problem:
    """Cross-entropy on noisy class templates, in the dtype of the model: easy enough to train in
    seconds."""
    source = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    templates = torch.randn((classes, *shape), generator=source)
    targets = torch.randint(0, classes, (examples,), generator=source)
    inputs = templates[targets] + noise * torch.randn((examples, *shape), generator=source)
    return Problem(model, nn.functional.cross_entropy, inputs.to(dtype), targets)


def mlp(
    widths: Sequence[int] = (20, 40, 40, 10), seed: int = 0, dtype: torch.dtype = torch.float64
) -> nn.Module:
    """A tanh network with reproducible weights; the default has 2,890 of them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return initialised(nn.Sequential(*layers[:-1]).to(dtype), seed)


def conv_net(seed: int = 0, dtype: torch.dtype = torch.float64, norm: bool = True) -> nn.Module:
    """A small convolutional net with batch normalisation on 1 x 8 x 8 images."""
    layers = [
        nn.Conv2d(1, 4, 3, padding=1, bias=not norm),
        *([nn.BatchNorm2d(4)] if norm else []),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        *([nn.BatchNorm2d(6)] if norm else []),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 10),
    ]
    return initialised(nn.Sequential(*layers).to(dtype), seed)


def initialised(model: nn.Module, seed: int) -> nn.Module:
    """Weights drawn from our own generator, so that the global one is neither read nor moved."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=source) / parameter[0].numel() ** 0.5
                )
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=source))
    return model


def train(
    problem: Problem,
    steps: int,
    lr: float = 0.05,
    batch_size: int = 64,
    momentum: float = 0.9,
    seed: int = 1,
) -> None:
    """Plain SGD on the problem's own examples; the model is left in training mode."""
    source = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=lr, momentum=momentum)
    problem.model.train()
    for _ in range(steps):
        rows = torch.randint(0, len(problem.targets), (batch_size,), generator=source)
        optimizer.zero_grad()
        problem.loss_fn(problem.model(problem.inputs[rows]), problem.targets[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()


def dense_hessian(problem: Problem) -> Tensor:
    """The Hessian of the mean loss by `torch.autograd.functional.hessian` on flat weights: no code
    of ours."""
    names = [name for name, p in problem.model.named_parameters() if p.requires_grad]
    tensors = [p.detach() for p in problem.model.parameters() if p.requires_grad]
    was_training = problem.model.training
    problem.model.eval()

    def loss(flat: Tensor) -> Tensor:
        pieces = torch.split(flat, [t.numel() for t in tensors])
        weights = {
            name: piece.view_as(t) for name, piece, t in zip(names, pieces, tensors, strict=True)
        }
        return problem.loss_fn(
            torch.func.functional_call(problem.model, weights, (problem.inputs,)), problem.targets
        )

    matrix = torch.autograd.functional.hessian(loss, torch.cat([t.reshape(-1) for t in tensors]))
    problem.model.train(was_training)
    return matrix
