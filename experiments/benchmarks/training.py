"""What the trainer costs over a bare PyTorch loop: paired ratios in one run.

Both train ResNet-20 on the same images (the first of CIFAR-10 where `--data-dir` has them, made-up pixels otherwise) with
the same augmentation, optimizer and batch size; rounds alternate, so that a noisy machine disturbs both alike. The ratio
of each round is trainer seconds over bare seconds; the table gives the median and the quartiles.

    python experiments/benchmarks/training.py --steps 10 --rounds 15
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import SGD

import hessianflow as hf
from hessianflow.data import Augmentation, DeviceBatches

BATCH = 128


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    images, targets = pixels(options.steps * BATCH, options.data_dir)
    ways: dict[str, Callable[[], None]] = {"bare": bare_loop(images, targets), "trainer": trainer(images, targets)}
    for run in ways.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds):
        for name in sorted(ways, reverse=bool(number % 2)):
            started = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(seconds["trainer"], seconds["bare"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"ResNet-20, batch {BATCH}, {options.steps} steps a round, {options.rounds} rounds, {options.threads} threads")
    print(f"bare loop     {1000 * statistics.median(seconds['bare']) / options.steps:8.1f} ms a step (median)")
    print(f"trainer       {1000 * statistics.median(seconds['trainer']) / options.steps:8.1f} ms a step (median)")
    print(f"paired ratio  {statistics.median(ratios):8.4f} (quartiles {low:.4f} to {high:.4f})")


def bare_loop(images: torch.Tensor, targets: torch.Tensor) -> Callable[[], None]:
    model, optimizer, batches = parts(images, targets)
    loss_fn = nn.CrossEntropyLoss()

    def run() -> None:
        model.train()
        for inputs, labels in batches:
            optimizer.zero_grad()
            loss_fn(model(inputs), labels).backward()
            optimizer.step()

    return run


def trainer(images: torch.Tensor, targets: torch.Tensor) -> Callable[[], None]:
    model, optimizer, batches = parts(images, targets)
    loss_fn = nn.CrossEntropyLoss()

    def run() -> None:
        hf.AdaptiveBatchTrainer(model, batches, optimizer=optimizer, loss_fn=loss_fn, epochs=1).fit()

    return run


def parts(images: torch.Tensor, targets: torch.Tensor) -> tuple[nn.Module, SGD, DeviceBatches]:
    torch.manual_seed(0)
    model = hf.models.create("resnet20")
    augment = Augmentation(crop_padding=4, flip=True)
    batches = DeviceBatches(images, targets, BATCH, augment=augment, mean=(0.5,) * 3, std=(0.25,) * 3, num_classes=10)
    return model, SGD(model.parameters(), lr=0.1, momentum=0.9), batches


def pixels(count: int, data_dir: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    if data_dir is not None:
        train = hf.data.load("cifar10", data_dir)
        return train.images[:count], train.targets[:count]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, torch.randint(10, (count,), generator=generator)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="steps a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", default=None, help="folder with the CIFAR-10 binary archive")
    return parser.parse_args()


if __name__ == "__main__":
    main()
