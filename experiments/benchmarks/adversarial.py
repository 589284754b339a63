"""Time of a training step with adversarial examples, as a ratio to the same step without.

    OMP_NUM_THREADS=1 python experiments/benchmarks/adversarial.py [--rounds 40] [--channels-last]
    [--bf16]

What is printed is the median over rounds of the ratio to the clean step of the same round, with its
quartiles (see paired.py). Freed memory is kept, as the command does (`hf.keep_freed_memory`).
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from itertools import repeat

import paired
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessianflow as hf

EPS, RANGE = 0.005, (0.0, 1.0)


def training_step(model: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """Forward, backward, SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def naive_fgsm(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """FGSM as it is commonly written: backward() also computes every weight gradient, to be thrown
    away."""
    leaf = x.clone().requires_grad_()
    model.eval()
    cross_entropy(model(leaf), y).backward()
    model.train()
    assert leaf.grad is not None
    return (x + EPS * leaf.grad.sign()).clamp(*RANGE)


def contenders(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """A step function by name, each on its own copy of the same model."""

    def with_share(share: float) -> Callable[[], object]:
        net = copy.deepcopy(model)
        step, adversary = training_step(net), hf.adversarial.FGSM(EPS, value_range=RANGE)
        return lambda: step(adversary.perturb(net, x, y, share), y)

    def naive(rows: int) -> Callable[[], object]:
        net = copy.deepcopy(model)
        step = training_step(net)
        return lambda: step(torch.cat([naive_fgsm(net, x[:rows], y[:rows]), x[rows:]]), y)

    def pair() -> Callable[[], object]:
        net = copy.deepcopy(model)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        attack = hf.adversarial.FGSM(EPS, value_range=RANGE)
        adversary = hf.adversarial.ConcurrentAdversary(attack, staleness=0)
        exposures = iter(hf.training.Ahead(repeat((x, y)), adversary, net))

        def step() -> None:
            exposure = next(exposures)
            optimizer.zero_grad()
            hf.training.exposed_loss(net, exposure, cross_entropy).backward()
            optimizer.step()

        return step

    def reuse(share: float) -> Callable[[], object]:
        net = copy.deepcopy(model)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        data = hf.data.DeviceBatches(
            x, y, len(x), augment=hf.data.Augmentation(crop_padding=4, flip=True)
        )
        next(iter(data))  # the batch whose augmentation is undone and made again
        adversary = hf.adversarial.GradientReuse(data, EPS, value_range=RANGE)

        def step() -> None:
            moved = adversary.attack(net, x, y, share)().requires_grad_()
            optimizer.zero_grad()
            cross_entropy(net(moved), y).backward()
            keep = adversary.expose(net, x, y, moved, share).on_input_gradient
            assert keep is not None
            assert moved.grad is not None
            keep(moved.grad)
            optimizer.step()

        return step

    return {
        "clean": with_share(0.0),
        "FGSM, share 0.2": with_share(0.2),
        "FGSM, share 0.2, naive": naive(len(x) // 5),
        "FGSM, every example": with_share(1.0),
        "FGSM, every example, naive": naive(len(x)),
        "clean and twin (sum of two means)": pair(),
        "reuse, share 0.2": reuse(0.2),
        "reuse, every example": reuse(1.0),
    }


def main() -> None:
    hf.keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--channels-last", action="store_true", help="images and model in that memory layout"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="WORDS",
        help="clean, and steps whose name holds them",
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true", help="steps and attacks under autocast")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(options.batch_size, 3, 32, 32, generator=generator).to(options.device)
    y = torch.randint(0, 10, (options.batch_size,), generator=generator).to(options.device)
    model = hf.models.create("resnet20", num_classes=10).to(options.device).train()
    if options.channels_last:
        x, model = (
            x.to(memory_format=torch.channels_last),
            model.to(memory_format=torch.channels_last),
        )
    steps = contenders(model, x, y)
    chosen = {
        name: step
        for name, step in steps.items()
        if name == "clean" or any(w in name for w in options.only)
    }
    with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
        seconds = paired.in_turn(chosen, options.rounds, device=options.device, warm_up=2)
    facts = f"batch {options.batch_size}", f"{options.rounds} rounds"
    print(paired.machine(options.device, *facts) + "\n")
    print("| step | median ms | ratio to clean (quartiles) |\n| --- | --- | --- |")
    for name, values in seconds.items():
        ratio = paired.spread(paired.ratios(values, seconds["clean"]))
        print(f"| {name} | {1000 * statistics.median(values):.1f} | {ratio} |")


if __name__ == "__main__":
    main()
