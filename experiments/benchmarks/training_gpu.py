"""What large batches buy on a GPU: wall time to the accuracy of batch 128, and whether the host
ever waits.

    python experiments/benchmarks/training_gpu.py --data-dir DIR [--parts speed waits race] [--seeds
    0 1 2]

    speed   images a second at each batch size (the largest microbatch that fits), with bf16 and
            channels last
    waits   host synchronisations in ten steady steps, counted by the profiler, plain and with FGSM
            (goal: none; twice a second, whatever the speed, the loop reads a few figures to notice
            a divergence)
    race    ResNet-20 to the end of the batch-128 schedule and, with ABSA, to the same test
            accuracy: the ratio of wall times (goal: at most 1/2)

Needs a CUDA device; without one it says so and ends with status 0.
"""

import argparse
import statistics
import sys
import time
from typing import Any, Literal

import torch
from pixels import cifar10
from torch import Tensor, nn

import hessianflow as hf
from hessianflow.training import AfterEpoch, Passes, Reporting, Schedule

PARTS = ("speed", "waits", "race")
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "aten::item",
    "aten::_local_scalar",
)
"""What the profiler calls it when the host waits for the device."""
Images = tuple[Tensor, Tensor]


def main() -> int:
    options = parse()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured")
        return 0
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}",
        flush=True,
    )
    train = cifar10(options.images, options.data_dir)
    test = cifar10(10_000, options.data_dir, "test")
    print(f"{train[2]}: {len(train[1])} training and {len(test[1])} test images")
    works = {"speed": speed, "waits": waits, "race": race}
    for part in options.parts:
        works[part](train[:2], test[:2], options)
    return 0


def trainer(
    train: Images,
    batch_size: int,
    test: Images | None = None,
    seed: int = 0,
    *,
    microbatch_size: int | Literal["auto"] | None = None,
    norm_batch_size: int | None = None,
    **options: Any,
) -> hf.AdaptiveBatchTrainer:
    """ResNet-20 with the defaults of the command, on the GPU."""
    torch.manual_seed(seed)
    model = hf.models.create("resnet20").to("cuda", memory_format=torch.channels_last)  # type: ignore[call-overload]
    pixels: dict[str, Any] = {
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.247, 0.2435, 0.2616),
        "num_classes": 10,
    }
    pixels |= {"device": "cuda", "channels_last": True}
    augment = hf.data.Augmentation(crop_padding=4, flip=True)
    batches = hf.data.DeviceBatches(*train, batch_size, seed=seed, augment=augment, **pixels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    epochs = options.setdefault("epochs", 1)
    milestones = [epochs // 2, epochs * 3 // 4]
    if options.pop("absa", False):
        options["controller"] = hf.control.ABSA(
            batch_size, options.pop("cap"), patience=options.pop("patience")
        )
        options["probe"] = hf.curvature.CurvatureProbe(
            model, nn.CrossEntropyLoss(), batches.sample(128), seed=seed
        )
        options["after_epoch"] = AfterEpoch(curvature=False)
    if options.pop("attack", False):
        eps = 0.005 / torch.tensor(pixels["std"]).view(-1, 1, 1)
        options["adversary"] = hf.adversarial.FGSM(eps, value_range=batches.value_range)
    return hf.AdaptiveBatchTrainer(
        model,
        batches,
        None if test is None else hf.data.DeviceBatches(*test, 2000, shuffle=False, **pixels),
        optimizer=optimizer,
        schedule=Schedule(torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)),
        loss_fn=nn.CrossEntropyLoss(),
        passes=Passes(microbatch_size, norm_batch_size, precision="bf16"),
        reporting=Reporting(show_progress=False),
        **options,
    )


def speed(train: Images, _test: Images, options: argparse.Namespace) -> None:
    print("\n| batch | microbatch found | images/s, median of epochs 2 and later |\n|---|---|---|")
    for size in options.sizes:
        made = trainer(train, size, epochs=4, microbatch_size="auto", norm_batch_size=128)
        rows = made.fit().epochs[1:]
        found = made.state_dict()["parts"]["microbatch"]["size"]
        print(
            f"| {size} | {found} |"
            f" {statistics.median(r['images_per_second'] for r in rows):,.0f} |",
            flush=True,
        )


def waits(train: Images, _test: Images, _options: argparse.Namespace) -> None:
    """Profile ten steps in the middle of an epoch, far from its ends and from the progress bar."""
    for attack in (False, True):
        profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        )

        def watch(
            inputs: Tensor, targets: Tensor, progress: Any, profiler: Any = profiler
        ) -> Images:
            if progress.updates == 30:
                profiler.__enter__()
            if progress.updates == 40:
                profiler.__exit__(None, None, None)
            return inputs, targets

        trainer(train, 512, epochs=1, microbatch_size=512, transform=watch, attack=attack).fit()
        found = {e.key: e.count for e in profiler.key_averages() if e.key.startswith(WAITS)}
        # Stopping the profiler itself waits once.
        allowed = {"cudaDeviceSynchronize": 1}
        extra = {key: count for key, count in found.items() if count > allowed.get(key, 0)}
        print(
            f"\n10 steps{' with FGSM' if attack else ''}: host waits {extra or 'none'}", flush=True
        )


def race(train: Images, test: Images, options: argparse.Namespace) -> None:
    print(
        "\n| seed | batch 128: accuracy, s | ABSA: accuracy, s, largest batch | s to the accuracy |"
        " ratio |"
    )
    print("|---|---|---|---|---|")
    for seed in options.seeds:
        common: dict[str, Any] = {
            "epochs": options.epochs,
            "seed": seed,
            "microbatch_size": "auto",
        }
        base, base_seconds = timed(trainer(train, 128, test, **common))
        goal = base.summary["final_accuracy"] - options.slack
        ours = trainer(
            train,
            128,
            test,
            absa=True,
            attack=True,
            cap=options.cap,
            patience=options.patience,
            **common,
        )
        history, seconds = timed(ours)
        reached = seconds_to(history, goal)
        ratio = "not reached" if reached is None else f"{reached / base_seconds:.2f}"
        shown = "-" if reached is None else f"{reached:.0f}"
        summary = history.summary
        print(
            f"| {seed} | {base.summary['final_accuracy']:.2%}, {base_seconds:.0f} |"
            f" {summary['final_accuracy']:.2%}, {seconds:.0f}, {summary['largest_batch']} | {shown}"
            f" | {ratio} |",
            flush=True,
        )


def timed(made: hf.AdaptiveBatchTrainer) -> tuple[hf.History, float]:
    started = time.perf_counter()
    history = made.fit()
    return history, time.perf_counter() - started


def seconds_to(history: hf.History, goal: float) -> float | None:
    """Wall seconds until the test accuracy first reached `goal`."""
    spent = 0.0
    for row in history.epochs:
        spent += row["seconds"]
        if row["eval_accuracy"] >= goal:
            return spent
    return None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--data-dir", default=None, help="folder with the CIFAR-10 binary archive")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096, 8192]
    )
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--cap", type=int, default=4096, help="largest batch of ABSA")
    parser.add_argument("--patience", type=int, default=5, help="of ABSA, in epochs")
    parser.add_argument(
        "--slack", type=float, default=0.002, help="how far below the accuracy counts as reached"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
