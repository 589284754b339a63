"""How often a difference of gradients refuses a healthy network, and how often it sees a faulty
one.

    python experiments/benchmarks/differences.py [--nets 300]

Prints one Markdown table. Random networks: eight kinds of layers, nine activations, float32 and
float64, 2 to 128 examples, four losses, weights at their initialisation or larger or smaller,
trained for 0, 10 or 100 steps, a third of them with inputs that are partly 0 and without biases.
Healthy ones are checked as they are, in four disguises that spoil differences, and as Gauss-Newton
and Fisher matrices; faulty ones have one fault in the middle, which need not matter to the product
(a dead unit, a part where the fault is linear).
"""

import argparse
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import hessianflow as hf

ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ReLU6,
    nn.Tanh,
    nn.GELU,
    nn.ELU,
    nn.Hardswish,
    nn.SiLU,
)
KINDS = (
    "dense",
    "dense",
    "dense, normalised",
    "convolutions",
    "convolutions, normalised",
    "residual",
    "attention",
)
CLASSES = 4


class Residual(nn.Module):
    """Two normalised convolutions beside a bypass."""

    def __init__(self, channels: int, activation: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            activation,
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
        )
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        outputs: Tensor = self.activation(x + self.body(x))
        return outputs


class Attention(nn.Module):
    """One layer of a transformer, averaged over places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        outputs: Tensor = self.layer(x).mean(1)
        return outputs


def network(kind: str, draw: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """A random network of one kind, and the shape of one of its inputs."""
    activation = draw.choice(ACTIVATIONS)
    if kind == "attention":
        return nn.Sequential(Attention(), nn.Linear(8, CLASSES)), (5, 8)
    widths = [draw.choice([3, 8, 20]) for _ in range(draw.choice([2, 3, 5]))]
    layers: list[nn.Module] = []
    if kind.startswith("dense"):
        for fan_in, fan_out in pairwise(widths):
            norm: list[nn.Module] = [nn.BatchNorm1d(fan_out)] if "normalised" in kind else []
            layers += [nn.Linear(fan_in, fan_out), *norm, activation()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES)), (widths[0],)
    if kind == "residual":
        layers = [
            nn.Conv2d(3, 8, 3, padding=1),
            Residual(8, activation()),
            Residual(8, activation()),
        ]
        widths = [3, 8]
    else:
        widths[0] = 3
        for fan_in, fan_out in pairwise(widths):
            norm = [nn.BatchNorm2d(fan_out)] if "normalised" in kind else []
            pool = [nn.MaxPool2d(2)] if draw.random() < 0.3 else []
            layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), *norm, activation(), *pool]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], CLASSES))
    return nn.Sequential(*layers, *head), (3, 16, 16)


LOSSES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    functional.cross_entropy,
    nn.CrossEntropyLoss(reduction="sum"),
    lambda o, t: functional.mse_loss(o, functional.one_hot(t, CLASSES).to(o)),
    lambda o, t: (1 + o - o.gather(1, t[:, None])).relu().mean(),
)


class Case:
    """One random network with its loss and batch."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        torch.manual_seed(seed)
        kind = draw.choice(KINDS)
        self.model, shape = network(kind, draw)
        self.loss_fn = draw.choice(LOSSES)
        examples = draw.choice([2, 4, 8, 32, 128])
        self.inputs = torch.randn(examples, *shape) * draw.choice([0.3, 1, 5]) + draw.choice([0, 1])
        self.targets = torch.randint(0, CLASSES, (examples,))
        scale = draw.choice([0.1, 1, 1, 3])
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(scale if parameter.ndim > 1 else 1)
        steps = draw.choice([0, 10, 100])
        normalises = "normalised" in kind or kind == "residual"
        self.options = (
            {"norm_mode": draw.choice(["eval", "batch"])} if normalises and examples > 4 else {}
        )
        dtype = draw.choice([torch.float32, torch.float32, torch.float64])
        if draw.random() < 0.3:
            self._put_on_kinks()
        self._train(steps)
        self.to(dtype)

    def _put_on_kinks(self) -> None:
        """Let half of each input be 0, and all biases: many units are then exactly where relu has
        no derivative."""
        self.inputs[..., : (self.inputs.shape[-1] + 1) // 2] = 0
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim == 1 and not bool((parameter == 1).all()):
                    parameter.zero_()

    def _train(self, steps: int) -> None:
        optimizer = torch.optim.SGD(self.model.parameters(), 0.05, 0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss_fn(self.model(self.inputs), self.targets).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            optimizer.step()
        optimizer.zero_grad()

    def to(self, dtype: torch.dtype) -> None:
        """Convert weights and inputs."""
        self.model, self.inputs = self.model.to(dtype), self.inputs.to(dtype)

    def layers(self) -> list[nn.Module]:
        """Return those that multiply."""
        return [m for m in self.model.modules() if type(m) in (nn.Linear, nn.Conv2d)]

    def after(self, layers: list[nn.Module], function: Callable[[Tensor], Tensor]) -> None:
        """Let a function run on the outputs of some layers."""
        for layer in layers:
            layer.register_forward_hook(lambda *given: function(given[2]))

    def is_refused(self, kind: type[Any] = hf.curvature.HessianOperator) -> bool:
        """Return whether the check says that products are wrong."""
        pair = self.inputs, self.targets
        operator = kind(self.model, self.loss_fn, pair, check_product=True, **self.options)
        try:
            operator.matvec(torch.ones(operator.size, dtype=operator.dtype))
        except hf.HessianFlowError as error:
            return "off from a difference of gradients" in str(error)
        return False


class HiddenRounding(torch.autograd.Function):
    """Rounds to 16 bits, and hands gradients through."""

    @staticmethod
    def forward(_: Any, a: Tensor) -> Tensor:
        """Round."""
        return a.bfloat16().to(a.dtype)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        """Pass on."""
        return gradient


class KeptOnContext(torch.autograd.Function):
    """A sigmoid whose value autograd takes for a constant."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        """Run."""
        ctx.value = a.sigmoid()
        return ctx.value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Differentiate."""
        return gradient * ctx.value * (1 - ctx.value)


class Reversed(torch.autograd.Function):
    """Passes values on, and gradients with the other sign."""

    @staticmethod
    def forward(_: Any, a: Tensor) -> Tensor:
        """Pass on."""
        return a.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        """Reverse."""
        return -gradient


def hooked(a: Tensor, hook: Callable[[Tensor], Tensor]) -> Tensor:
    copy = a * 1
    if copy.requires_grad:
        copy.register_hook(hook)
    return copy


def unchanged(_: Case) -> None:
    """Leave the network as it is."""


def bound_to_float32(case: Case) -> None:
    """Let the layers refuse any other type."""
    case.to(torch.float32)
    case.after(case.layers(), float32_only)


def float32_only(a: Tensor) -> Tensor:
    if a.dtype == torch.float64:
        raise TypeError("float32 only")
    return a


DISGUISES: dict[str, Callable[[Case], object]] = {
    "as they are": unchanged,
    "weights in 16 bits": lambda case: case.to(torch.bfloat16),
    "run in float32 only": bound_to_float32,
    "every layer rounds to float32": lambda case: case.after(
        case.layers(), lambda a: a.float().to(a.dtype)
    ),
    "every layer rounds to 16 bits": lambda case: case.after(
        case.layers(), lambda a: a.bfloat16().to(a.dtype)
    ),
    "the same, hidden from the graph": lambda case: case.after(case.layers(), HiddenRounding.apply),
}
FIRST = "an intermediate kept on ctx"
FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    FIRST: lambda a: a * KeptOnContext.apply(a),
    "a reversed gradient": Reversed.apply,
    "a hook that halves a gradient": lambda a: hooked(a, lambda g: g * 0.5),
    "a hook that clamps a gradient": lambda a: hooked(
        a, lambda g: torch.clamp(g, -g.abs().mean(), g.abs().mean())
    ),
    "a detached part": lambda a: a * a.detach().sigmoid(),
}


def distance(seed: int) -> float:
    """Relative difference of the products with and without the first fault, in float64."""
    products = []
    for function in (KeptOnContext.apply, torch.sigmoid):
        case = Case(seed)
        case.to(torch.float64)
        layers = case.layers()
        case.after([layers[len(layers) // 2]], lambda a, f=function: a * f(a))
        pair = case.inputs, case.targets
        operator = hf.curvature.HessianOperator(
            case.model, case.loss_fn, pair, check_product=False, **case.options
        )
        source = torch.Generator().manual_seed(seed)
        products.append(
            operator.matvec(torch.randn(operator.size, generator=source, dtype=torch.float64))
        )
    return float((products[0] - products[1]).norm() / products[1].norm().clamp_min(1e-300))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", type=int, default=300)
    count = parser.parse_args().nets
    torch.set_num_threads(1)
    print("| networks | refused |\n|---|---|")
    for name, disguise in DISGUISES.items():
        refused = 0
        for seed in range(count):
            case = Case(seed)
            disguise(case)
            refused += case.is_refused()
        print(f"| healthy, {name} | {refused} of {count} |", flush=True)
    for kind in (hf.curvature.GGNOperator, hf.curvature.FisherOperator):
        refused = sum(Case(seed).is_refused(kind) for seed in range(count // 3))
        print(f"| healthy, {kind.__name__} | {refused} of {count // 3} |", flush=True)
    for name, fault in FAULTS.items():
        seen = [False] * (count // 3)
        for seed in range(count // 3):
            case = Case(seed)
            layers = case.layers()
            case.after([layers[len(layers) // 2]], fault)
            seen[seed] = case.is_refused()
        print(f"| faulty: {name} | {sum(seen)} of {count // 3} |", flush=True)
        if name == FIRST:
            for low, high in ((1e-3, 1e-2), (1e-2, float("inf"))):
                off = [found for seed, found in enumerate(seen) if low <= distance(seed) < high]
                print(
                    f"| ... of which off by {low:g} to {high:g} | {sum(off)} of {len(off)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
