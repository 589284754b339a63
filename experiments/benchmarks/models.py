"""Time forward and backward of SqueezeNext: ours against pytorchcv's, with the same weights, on the
same images.

    pip install --no-deps pytorchcv
    OMP_NUM_THREADS=1 python experiments/benchmarks/models.py [--rounds 15] [--batch 8] [--size 224]

What is printed is the median over rounds of the ratio of processor times within a round, with its
quartiles (see paired.py).
"""

import argparse
import statistics
from collections.abc import Callable
from itertools import product

import paired
import torch
from torch import Tensor, nn

import hessianflow as hf

PAIRS = {"sqnxt23_w1": "squeezenext-1.0-23", "sqnxt23v5_w1": "squeezenext-1.0-23v5"}
"""Networks of pytorchcv and ours; in its style, and in that of the authors."""


def networks(theirs: str, ours: str, size: int) -> dict[str, nn.Module]:
    """pytorchcv's network, ours of the same style with its weights, and ours as published; for
    ImageNet."""
    from pytorchcv.models import squeezenext

    reference = getattr(squeezenext, theirs)()
    same = hf.models.create(f"{ours}@pytorchcv", 1000, size, "imagenet")
    copy_weights(reference, same)
    return {
        "pytorchcv": reference,
        "ours": same,
        "ours, as published": hf.models.create(ours, 1000, size, "imagenet"),
    }


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers layer by layer: in a block, ours has the shortcut first, theirs
    last."""
    with torch.no_grad():
        for given, taken in zip(
            _tensors(source, "identity_conv"), _tensors(target, "shortcut"), strict=True
        ):
            taken.copy_(given)


def _tensors(model: nn.Module, shortcut: str) -> list[Tensor]:
    """All tensors of the layers, those of the shortcuts after all others."""
    layers = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
    ]
    ordered = sorted(layers, key=lambda layer: shortcut in layer[0])  # stable: else as in the model
    return [tensor for _, module in ordered for tensor in module.state_dict().values()]


def step_of(
    model: nn.Module, images: Tensor, targets: Tensor, *, bf16: bool
) -> Callable[[], object]:
    """One forward and backward in training mode."""
    model.train()

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(model(images), targets)
        loss.backward()

    return step


def main() -> None:
    """Check that the networks are the same function, and time them in two layouts and
    precisions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    torch.manual_seed(0)
    plain, targets = (
        torch.randn(options.batch, 3, options.size, options.size),
        torch.randint(1000, (options.batch,)),
    )
    print(paired.machine("cpu", f"{options.batch} images of {options.size}"))
    print(
        "| network | layout, precision | pytorchcv, s | ours / pytorchcv | as published /"
        " pytorchcv |"
    )
    print("| --- | --- | --- | --- | --- |")
    for (theirs, ours), last, bf16 in product(PAIRS.items(), (False, True), (False, True)):
        models = networks(theirs, ours, options.size)
        layout = torch.channels_last if last else torch.contiguous_format
        images = plain.contiguous(memory_format=layout)
        with torch.no_grad():
            outputs = [
                models[name].double().eval()(plain.double()) for name in ("pytorchcv", "ours")
            ]
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
        steps = {
            n: step_of(m.float().to(memory_format=layout), images, targets, bf16=bf16)
            for n, m in models.items()
        }
        times = paired.in_turn(steps, options.rounds, warm_up=2)
        ratios = [
            paired.spread(paired.ratios(times[name], times["pytorchcv"]))
            for name in ("ours", "ours, as published")
        ]
        what = f"{'channels last' if last else 'contiguous'}, {'bf16' if bf16 else 'float32'}"
        print(
            f"| {ours} | {what} | {statistics.median(times['pytorchcv']):.3f} |"
            f" {' | '.join(ratios)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
