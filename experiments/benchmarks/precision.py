"""Does bf16 cost accuracy? The same runs in float32 and in bf16, seed by seed, on real images.

    OMP_NUM_THREADS=1 python experiments/benchmarks/precision.py --seeds 0 1

ResNet-8 on the first CIFAR-10 images, crops and flips, batch 128, momentum 0.9, rate 0.1 with
cosine decay. Both runs of a seed start at the same weights and see the same batches.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from pixels import cifar10
from torch import nn

import hessianflow as hf
from hessianflow.training import Passes, Reporting, Schedule


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    train, test = (
        cifar10(n, options.data_dir, s)
        for n, s in ((options.images, "train"), (options.tests, "test"))
    )
    print(
        f"{train[2]}: {options.images} training, {options.tests} test images, {options.epochs}"
        " epochs",
        flush=True,
    )
    print(
        "\n| seed | float32 | bf16 | difference, points | float32 / bf16 CPU seconds"
        " |\n|---|---|---|---|---|"
    )
    differences = []
    for seed in options.seeds:
        found = [
            accuracy(precision, seed, train, test, options.epochs)
            for precision in ("float32", "bf16")
        ]
        (exact, slow), (rounded, fast) = found
        differences.append(100 * (rounded - exact))
        print(
            f"| {seed} | {exact:.2%} | {rounded:.2%} | {differences[-1]:+.2f} |"
            f" {slow / fast:.2f} |",
            flush=True,
        )
    error = 100 * 0.5 / options.tests**0.5
    print(
        f"\nmean difference {statistics.mean(differences):+.2f} points; one accuracy has a standard"
        " error of ",
        end="",
    )
    print(f"at most {error:.2f} points from {options.tests} test images")


def accuracy(precision: Any, seed: int, train: Any, test: Any, epochs: int) -> tuple[float, float]:
    """Final test accuracy, and CPU seconds."""
    torch.manual_seed(seed)
    model = hf.models.create("resnet8").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pixels: dict[str, Any] = {
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "num_classes": 10,
        "channels_last": True,
    }
    augment = hf.data.Augmentation(crop_padding=4, flip=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    started = time.process_time()
    history = hf.AdaptiveBatchTrainer(
        model,
        hf.data.DeviceBatches(*train[:2], 128, seed=seed, augment=augment, **pixels),
        hf.data.DeviceBatches(*test[:2], 500, shuffle=False, **pixels),
        optimizer=optimizer,
        schedule=Schedule(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)),
        loss_fn=nn.CrossEntropyLoss(),
        epochs=epochs,
        passes=Passes(precision=precision),
        reporting=Reporting(show_progress=False),
    ).fit()
    return float(history.summary["final_accuracy"]), time.process_time() - started


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--tests", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--data-dir", default=None, help="folder with the CIFAR-10 binary archive")
    return parser.parse_args()


if __name__ == "__main__":
    main()
