"""Time one optimizer step: ours on lists of tensors, the same rule tensor by tensor, and torch's
own foreach SGD.

    OMP_NUM_THREADS=1 python experiments/benchmarks/optimizers.py [--tensors 60] [--shrink 1]
    [--rounds 300]

What is printed is the median over rounds of the ratio within a round, with its quartiles (see
paired.py).
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import paired
import torch
from torch import Tensor

from hessianflow.optim import CLARS, LAMB, LARS, MicrobatchNorms


class LoopLARS(torch.optim.Optimizer):
    """LARS as it is commonly written: one tensor after another, asking the host whether a norm is
    zero."""

    def __init__(
        self, params: list[Tensor], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every parameter."""
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            for p in group["params"]:
                d, ratio = p.grad, lr
                if p.ndim > 1:
                    weight, gradient = torch.norm(p), torch.norm(p.grad)
                    if weight > 0 and gradient > 0:
                        ratio = lr * 0.001 * weight / (gradient + decay * weight)
                    d = d.add(p, alpha=decay)
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].mul_(momentum).add_(ratio * d)
                p.sub_(state["momentum_buffer"])


class FusedLARS(torch.optim.Optimizer):
    """A trial: torch's fused SGD kernel once a tensor, which reads and writes each of them once.
    For a processor.

    buffer = momentum * buffer + (1 - dampening) * (gradient + decay * weight), so 1 - dampening is
    rate times ratio. Only for gradients with the strides of their weights: the kernel does not
    look.
    """

    def __init__(
        self, params: list[Tensor], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for p in params:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every parameter."""
        for group in self.param_groups:
            lr, decay, params = group["lr"], group["weight_decay"], group["params"]
            matrices = [p for p in params if p.ndim > 1]
            norms = torch.stack(
                torch._foreach_norm([*matrices, *(p.grad for p in matrices)], 2)
            ).view(2, -1)
            weight, gradient = norms.unbind()
            rates = torch.where(
                (norms > 0).all(0), lr * 0.001 * weight / (gradient + decay * weight), lr
            )
            for p, rate in zip(matrices, rates.tolist(), strict=True):
                self._fused([p], group["momentum"], 1 - rate, 1.0, decay)
            vectors = [p for p in params if p.ndim <= 1]
            if vectors:
                self._fused(vectors, group["momentum"], 0.0, lr, 0.0)

    def _fused(
        self, params: list[Tensor], momentum: float, dampening: float, lr: float, decay: float
    ) -> None:
        torch._fused_sgd_(
            params,
            [p.grad for p in params],
            [self.state[p]["momentum_buffer"] for p in params],
            weight_decay=decay,
            momentum=momentum,
            lr=lr,
            dampening=dampening,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )


def peers(
    make: Callable[[], list[Tensor]], options: dict[str, float]
) -> dict[str, Callable[[], object]]:
    """LARS of pytorch_optimizer, where that is installed; vectors without decay, as ours has
    them."""
    try:
        import pytorch_optimizer
    except ImportError:
        return {}
    found: dict[str, Callable[[], object]] = {}
    for foreach, name in ((False, "tensor by tensor"), (True, "on lists")):
        params = make()
        groups: list[dict[str, Any]] = [
            {"params": [p for p in params if p.ndim > 1]},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        found[f"pytorch_optimizer, {name}"] = pytorch_optimizer.LARS(
            groups, 1e-3, foreach=foreach, **options
        ).step
    return found


def parameters(tensors: int, kind: str, shrink: int, device: str) -> list[Tensor]:
    """`tensors` tensors with gradients. "network": convolution, scale and shift in turn, as in
    ResNet-20.

    Widths are those of ResNet-20 divided by `shrink`.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(tensors):
        width = (16, 32, 64)[index * 3 // tensors] // shrink
        shape = (width, width, 3, 3) if kind == "matrices" or index % 3 == 0 else (width,)
        parameter = torch.randn(shape, generator=generator).to(device).requires_grad_()
        parameter.grad = torch.randn(shape, generator=generator).to(device)
        found.append(parameter)
    return found


def contenders(
    tensors: int, kind: str, shrink: int, device: str
) -> dict[str, Callable[[], object]]:
    """A step function by name, each on its own copy of the same parameters."""
    options = {"momentum": 0.9, "weight_decay": 1e-4}
    make = lambda: parameters(tensors, kind, shrink, device)  # noqa: E731
    clars_params = make()
    norms = MicrobatchNorms(clars_params)
    norms.on_microbatch([p.grad for p in clars_params if p.grad is not None], 1)
    return {
        "torch SGD, foreach": torch.optim.SGD(make(), 1e-3, foreach=True, **options).step,
        "LARS": LARS(make(), 1e-3, **options).step,
        "LARS, tensor by tensor": LoopLARS(make(), 1e-3, **options).step,
        **(
            {"LARS, fused trial": FusedLARS(make(), 1e-3, **options).step}
            if device == "cpu"
            else {}
        ),
        **peers(make, options),
        "CLARS": CLARS(clars_params, 1e-3, norms=norms, **options).step,
        "torch AdamW, foreach": torch.optim.AdamW(make(), 1e-3, foreach=True).step,
        "LAMB": LAMB(make(), 1e-3, weight_decay=1e-2).step,
    }


def show(seconds: dict[str, list[float]], kind: str) -> None:
    """Print medians and the ratios that the goals are stated in."""
    print(f"\n{kind}\n| optimizer | median step, us |\n| --- | --- |")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values) * 1e6:.0f} |")
    print("| paired ratio | median (quartiles) |\n| --- | --- |")
    for top, bottom in (
        ("LARS", "torch SGD, foreach"),
        ("LARS, tensor by tensor", "LARS"),
        ("LARS, fused trial", "LARS"),
        ("LARS, tensor by tensor", "LARS, fused trial"),
        ("pytorch_optimizer, tensor by tensor", "LARS"),
        ("pytorch_optimizer, on lists", "LARS"),
        ("CLARS", "torch SGD, foreach"),
        ("LARS, tensor by tensor", "torch SGD, foreach"),
        ("LAMB", "torch AdamW, foreach"),
    ):
        if top not in seconds or bottom not in seconds:
            continue
        ratio = paired.spread(paired.ratios(seconds[top], seconds[bottom]), "{:.2f}")
        print(f"| {top} / {bottom} | {ratio} |")


def main() -> None:
    """Time both kinds of parameter list."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tensors", type=int, default=60)
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    rounds, device = arguments.rounds, arguments.device
    print(paired.machine(device, f"{rounds} rounds"))
    for kind in ("network", "matrices"):
        steps = contenders(arguments.tensors, kind, arguments.shrink, device)
        show(
            paired.in_turn(steps, rounds, device=device, warm_up=10),
            f"{arguments.tensors} tensors, {kind}, widths / {arguments.shrink}",
        )


if __name__ == "__main__":
    main()
