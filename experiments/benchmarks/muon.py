"""Time one step of Muon on the matrices of a network: ours, which takes matrices of one shape
together, the same rule matrix by matrix, and torch's own.

    OMP_NUM_THREADS=1 python experiments/benchmarks/muon.py [--model resnet20] [--rounds 100]
    [--batch 1024] [--device cpu]

What is printed is the median over rounds of the ratio within a round, with its quartiles (see
paired.py); then the share of a whole update that is the step of all parameters, with forward and
backward passes over a batch in microbatches of 128.
"""

import argparse
import copy
import statistics
from collections.abc import Callable

import paired
import torch
from torch import Tensor, nn

from hessianflow import keep_freed_memory
from hessianflow.models import create
from hessianflow.optim import Muon, muon_groups

MICROBATCH = 128


class LoopMuon(torch.optim.Optimizer):
    """Muon as it is commonly written: one matrix after another, in the type of the matrix."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every matrix."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                memory = state["momentum_buffer"]
                memory.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalised(p.grad.lerp(memory, group["momentum"]).flatten(1))
                scale = max(1, update.size(0) / update.size(1)) ** 0.5
                p.add_(update.view(p.shape), alpha=-group["lr"] * scale)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Five steps of the published iteration on one matrix."""
    if matrix.size(0) > matrix.size(1):
        return orthogonalised(matrix.T).T.contiguous()
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(5):
        square = matrix @ matrix.T
        polynomial = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
        matrix = torch.addmm(matrix, polynomial, matrix, beta=3.4445)
    return matrix


def matrices(model: nn.Module, flat: bool = False) -> list[Tensor]:
    """Copies of the weights that Muon is for, with gradients; as matrices if asked."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for group in muon_groups(model):
        for weight in group["params"] if group["part"] != "rest" else []:
            own = weight.detach().clone()
            if flat:
                own = own.flatten(1)
            own.requires_grad_()
            own.grad = torch.randn(own.shape, generator=generator).to(own.device)
            found.append(own)
    return found


def contenders(model: nn.Module) -> dict[str, Callable[[], object]]:
    """A step function by name, each on its own copy of the same matrices."""
    return {
        "Muon, own precision": Muon(matrices(model), 1e-3, precision="own").step,
        "Muon, bfloat16": Muon(matrices(model), 1e-3, precision="bfloat16").step,
        "Muon renormalised, own precision": Muon(
            matrices(model), 1e-3, form="renormalised", precision="own"
        ).step,
        "matrix by matrix, own precision": LoopMuon(matrices(model), 1e-3, 0.6).step,
        "torch.optim.Muon, bfloat16": torch.optim.Muon(matrices(model, flat=True), 1e-3).step,
        "torch SGD, foreach": torch.optim.SGD(
            matrices(model), 1e-3, momentum=0.9, foreach=True
        ).step,
    }


RATIOS = (
    ("Muon, own precision", "matrix by matrix, own precision"),
    ("Muon renormalised, own precision", "matrix by matrix, own precision"),
    ("Muon, bfloat16", "torch.optim.Muon, bfloat16"),
    ("Muon, own precision", "torch.optim.Muon, bfloat16"),
    ("Muon, own precision", "Muon, bfloat16"),
    ("Muon, own precision", "torch SGD, foreach"),
)


def show(seconds: dict[str, list[float]]) -> None:
    """Print medians and the ratios that the goals are stated in."""
    print("| optimizer | median step, us |\n| --- | --- |")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values) * 1e6:.0f} |")
    print("\n| paired ratio | median (quartiles) |\n| --- | --- |")
    for top, bottom in RATIOS:
        ratio = paired.spread(paired.ratios(seconds[top], seconds[bottom]), "{:.2f}")
        print(f"| {top} / {bottom} | {ratio} |")


def update(model: nn.Module, batch: int, device: str) -> dict[str, Callable[[], object]]:
    """The passes of an update and the step that ends it, on one model."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    optimizer = Muon(muon_groups(model), 0.24)
    inputs = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    targets = torch.randint(10, (batch,), device=device)

    def passes() -> None:
        optimizer.zero_grad()
        for part, answers in zip(inputs.split(MICROBATCH), targets.split(MICROBATCH), strict=True):
            loss = nn.functional.cross_entropy(model(part), answers, reduction="sum")
            (loss / batch).backward()

    return {"passes": passes, "step": optimizer.step}


def main() -> None:
    """Time the steps, then an update."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = arguments.device
    keep_freed_memory()  # as the trainer has it on a processor
    model = create(arguments.model).to(device)
    print(paired.machine(device, f"{arguments.rounds} rounds", arguments.model))
    show(paired.in_turn(contenders(model), arguments.rounds, device=device, warm_up=5))
    rounds = max(3, arguments.rounds // 20)
    seconds = paired.in_turn(update(model, arguments.batch, device), rounds, device=device)
    share = [100 * b / (a + b) for a, b in zip(seconds["passes"], seconds["step"], strict=True)]
    print(f"\nstep in an update of {arguments.batch}: {paired.spread(share, '{:.2f}')} %")


if __name__ == "__main__":
    main()
