"""Speed of the data path alone: batches cut on the device against a DataLoader with per-image
Pillow transforms.

    python experiments/benchmarks/data_path.py [--device cpu] [--batch-size 128] [--num-workers 0]
    [--rounds 5]

Both sides pad by 4, crop at random, mirror half, normalise, and put float32 batches of 3x32x32
images on the device. They run in turn, round by round, in one process; the printed ratio is the
median of the ratios of the rounds. Pixels are random (their values do not influence the time).
Goal: a ratio of at least 5. Needs Pillow.

Also printed: the time of `set_batch_size` (goal: below 1 ms) and whether the very next batch has
the new size.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hessianflow.data import Augmentation, DeviceBatches

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class PillowImages(Dataset[tuple[Tensor, int]]):
    """One image at a time, as tutorials do it: Pillow for geometry, then a normalised tensor."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = targets.tolist()
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        padded = Image.new("RGB", (40, 40))
        padded.paste(Image.fromarray(self.images[index]), (4, 4))
        left, top = random.randint(0, 8), random.randint(0, 8)
        image = padded.crop((left, top, left + 32, top + 32))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        return pixels.sub_(self.mean).div_(self.std), self.targets[index]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    images = torch.randint(0, 256, (options.images, 3, 32, 32), dtype=torch.uint8)
    targets = torch.randint(0, 10, (options.images,))
    ours = device_batches(images, targets, options, channels_last=False)
    last = device_batches(images, targets, options, channels_last=True)
    loader: DataLoader[Any] = DataLoader(
        PillowImages(images, targets),
        options.batch_size,
        shuffle=True,
        num_workers=options.num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=options.num_workers > 0,
    )
    sides: dict[str, Iterable[Any]] = {
        "DataLoader, Pillow": loader,
        "device": ours,
        "device, channels-last": last,
    }
    seconds = {name: [] for name in sides}
    for number in range(options.rounds + 1):
        for name, batches in sides.items():
            elapsed = timed(lambda batches=batches: consume(batches, device), device)
            if number > 0:  # the first round warms up
                seconds[name].append(elapsed)
    report(seconds, options)
    report_resizing(ours)


def device_batches(
    images: Tensor, targets: Tensor, options: argparse.Namespace, channels_last: bool
) -> DeviceBatches:
    augment = Augmentation(crop_padding=4, flip=True)
    return DeviceBatches(
        images,
        targets,
        options.batch_size,
        device=options.device,
        augment=augment,
        mean=MEAN,
        std=STD,
        channels_last=channels_last,
    )


def consume(batches: Iterable[Any], device: torch.device) -> None:
    for inputs, targets in batches:
        inputs.to(device, non_blocking=True)
        targets.to(device, non_blocking=True)


def timed(action: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def report(seconds: dict[str, list[float]], options: argparse.Namespace) -> None:
    base = seconds["DataLoader, Pillow"]
    print(
        f"{options.images} images a round, batch {options.batch_size}, {options.device}, torch"
        f" {torch.__version__}"
    )
    for name, times in seconds.items():
        ratios = [b / t for b, t in zip(base, times, strict=True)]
        speed = options.images / statistics.median(times)
        spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
        print(f"{name:24s} {speed:12,.0f} images/s   x{statistics.median(ratios):.1f} ({spread})")


def report_resizing(batches: DeviceBatches) -> None:
    times = []
    stream = iter(batches)
    for size in range(64, 164):
        start = time.perf_counter()
        batches.set_batch_size(size)
        times.append(time.perf_counter() - start)
        if len(next(stream)[1]) != size:
            raise SystemExit(f"the batch after set_batch_size({size}) has another size")
    print(
        f"set_batch_size: median {1e6 * statistics.median(times):.1f} us, worst"
        f" {1e6 * max(times):.1f} us; every next batch had the new size"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--images", type=int, default=25_000)
    parser.add_argument("--num-workers", type=int, default=0, help="of the DataLoader")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch in this process")
    return parser.parse_args()


if __name__ == "__main__":
    main()
