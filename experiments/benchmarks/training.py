"""What the trainer costs over a bare PyTorch loop, and what its defaults gain: paired ratios in one
run.

    OMP_NUM_THREADS=1 python experiments/benchmarks/training.py [--parts loop defaults ...]

ResNet-20 at batch 128 on CIFAR-10 images with crops and flips. Whatever is compared runs in turn,
round by round, in one process; the ratio is taken within each round, and the table gives its median
and quartiles. Times are process CPU seconds of one thread: on a machine that others use, too, wall
clocks measure them. Freed memory is kept on both sides (`hf.keep_freed_memory`), as the command
does, unless --give-back is given.

A curvature reading is set against epochs of 390 steps (CIFAR-10) and 78 (10,000 images).

    loop      trainer, trainer with FGSM or reuse on a fifth of each batch, and readings, against
              the bare loop
    price     a product with the Hessian, in gradients of as many training examples
    defaults  layout and precision
    batches   images a second as the batch grows at microbatch 128
    allocation  the bare loop with freed memory kept and given back, in two processes that take
                turns
    memory    peak resident memory of a process each
    resize    how long a change of the batch size takes, and whether the very next batch has it
    profile   where the time goes, before (float32, NCHW) and after (bf16, channels last)
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from paired import in_turn, ratios, spread, timed
from pixels import cifar10
from torch import Tensor, nn
from torch.optim import SGD

import hessianflow as hf
import hessianflow.data.datasets
from hessianflow.measurements import FLOAT32_PER_16_BIT
from hessianflow.training import Passes

BATCH = 128
PARTS = ("loop", "price", "defaults", "batches", "allocation", "memory", "resize", "profile")
EPOCHS = (390, 78)
"""Steps of an epoch that a curvature reading is set against: all of CIFAR-10, and 10,000 images."""
ATTACKS = {"trainer + FGSM": "fgsm", "trainer + reuse": "reuse"}
"""Ways to train on a fifth of each batch made adversarial."""
BUDGET = hf.data.datasets.DATA_SETS["cifar10"].preset.settings["curvature_budget"]
"""What the command allows readings by default."""


@dataclass(frozen=True)
class Path:
    """What both sides of a comparison share."""

    precision: str = "bf16"
    channels_last: bool = True

    def __str__(self) -> str:
        return f"{self.precision}, {'channels last' if self.channels_last else 'NCHW'}"


class TickingBatches(hf.data.DeviceBatches):
    """Notes the CPU time at which each batch is asked for: the time of a step, whoever takes it."""

    ticks: tuple[float, ...] = ()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches."""
        self.ticks = ()
        for batch in super().__iter__():
            self.ticks = (*self.ticks, time.process_time())
            yield batch

    def step_seconds(self) -> float:
        """Median over the last epoch, without its first step (which warms up) and its last (which
        closes the epoch)."""
        return statistics.median(b - a for a, b in pairwise(self.ticks[1:]))


class Subject:
    """A ResNet-20 with its optimizer and its data, new for every way of training it."""

    def __init__(
        self, path: Path, images: Tensor, targets: Tensor, batch_size: int = BATCH
    ) -> None:
        torch.manual_seed(0)
        self.path = path
        self.model = hf.models.create("resnet20")
        if path.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.loss_fn = nn.CrossEntropyLoss()
        self.batches = TickingBatches(
            images,
            targets,
            batch_size,
            augment=hf.data.Augmentation(crop_padding=4, flip=True),
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            num_classes=10,
            channels_last=path.channels_last,
        )

    def bare(self) -> None:
        """One epoch as written by hand."""
        self.model.train()
        for inputs, labels in self.batches:
            self.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.path.precision == "bf16"):
                loss = self.loss_fn(self.model(inputs), labels)
            loss.backward()
            self.optimizer.step()

    def attack(self, name: str) -> Any:
        """An adversary; reuse keeps what it has learned of the images from one epoch to the
        next."""
        limits = {"value_range": self.batches.value_range}
        if name == "reuse":
            return hf.adversarial.GradientReuse(self.batches, 0.02, **limits)
        return hf.adversarial.FGSM(0.02, **limits)

    def trained(
        self, adversary: Any = None, norm_batch_size: int | None = None, **options: Any
    ) -> hf.AdaptiveBatchTrainer:
        """A trainer for one epoch; with an adversary it has a fifth of each batch."""
        if adversary is not None:
            options["adversary"] = adversary
        precision: Any = self.path.precision
        return hf.AdaptiveBatchTrainer(
            self.model,
            self.batches,
            optimizer=self.optimizer,
            loss_fn=self.loss_fn,
            passes=Passes(BATCH, norm_batch_size, precision=precision),
            epochs=1,
            **options,
        )

    def probe(self, examples: int, **options: Any) -> hf.curvature.CurvatureProbe:
        """A warm-started probe on `examples` fixed images."""
        return hf.curvature.CurvatureProbe(
            self.model, self.loss_fn, self.batches.sample(examples), **options
        )


def loop(options: argparse.Namespace) -> None:
    for path in map(Path, options.precisions):
        pixels = cifar10((options.steps + 2) * BATCH, options.data_dir)[:2]
        subjects = {name: Subject(path, *pixels) for name in ("bare", "trainer", *ATTACKS)}
        adversaries = {name: subjects[name].attack(kind) for name, kind in ATTACKS.items()}
        bare = subjects["bare"]
        probes = {n: bare.probe(n) for n in (128, 64, 32)}
        cost = FLOAT32_PER_16_BIT if path.precision == "bf16" else 1
        budgeted = {count: bare.probe(64, budget=BUDGET / cost) for count in EPOCHS}
        steps: dict[str, list[float]] = {name: [] for name in subjects}
        readings: dict[int, list[float]] = {n: [] for n in probes}
        spent: dict[int, list[float]] = {count: [] for count in EPOCHS}
        for number in range(options.rounds + 1):
            for name in list(subjects)[:: -1 if number % 2 else 1]:
                subject = subjects[name]
                run = subject.bare if name == "bare" else subject.trained(adversaries.get(name)).fit
                run()
                steps[name].append(subject.batches.step_seconds())
            for n, probe in probes.items():
                if n < 128 or number % 2 == 0:  # the largest takes long
                    readings[n].append(timed(probe)[0])
            for count, probe in budgeted.items():
                is_due = number > 0 and probe.is_affordable(number * count * BATCH)
                spent[count].append(timed(probe)[0] if is_due else 0.0)
        measured = {name: found[1:] for name, found in steps.items()}  # the first round warms up
        report(path, measured, {n: found[1:] for n, found in readings.items()})
        report_budget(measured, {count: found[1:] for count, found in spent.items()})


def price(options: argparse.Namespace) -> None:
    """What a product costs beside training: least squares over readings of 64 after every few
    steps."""
    for path in map(Path, options.precisions):
        subject = Subject(path, *cifar10((options.steps + 2) * BATCH, options.data_dir)[:2])
        probe = subject.probe(64)
        subject.bare()
        probe()  # starts cold
        products, costs = [], []
        for _ in range(options.rounds):
            subject.bare()
            step = subject.batches.step_seconds()
            for _ in range(2):
                seconds, reading = timed(probe)
                products.append(float(reading.matvecs))
                costs.append(seconds / step * BATCH / 64)
        slope, graph = statistics.linear_regression(products, costs)
        print(
            f"\n{path}: {slope:.2f} gradients a product, {graph:.2f} a reading ({len(costs)}"
            " readings)",
            flush=True,
        )


def report(
    path: Path, steps: Mapping[str, Sequence[float]], readings: Mapping[int, Sequence[float]]
) -> None:
    bare = statistics.median(steps["bare"])
    print(
        f"\n{path}: bare step {1000 * bare:.0f} ms\n\n| against the bare loop | ratio (quartiles)"
        " |\n|---|---|"
    )
    over = {name: ratios(found, steps["bare"]) for name, found in steps.items()}
    for name in ("trainer", *ATTACKS):
        print(f"| {name} | {spread(over[name], '{:.3f}')} |")
    fgsm = ratios(steps["trainer + FGSM"], steps["trainer"])
    print(f"| FGSM over the trainer without | {spread(fgsm, '{:.3f}')} |")
    for n, found in readings.items():
        shares = [
            f"{spread([s / (count * bare) for s in found], '{:.1%}')} of {count} steps"
            for count in EPOCHS
        ]
        print(
            f"| reading of {n} examples | {spread([s / bare for s in found], '{:.1f}')} steps;"
            f" {'; '.join(shares)} |"
        )
        both = (
            statistics.median(over["trainer + FGSM"])
            - 1
            + statistics.median(found) / (EPOCHS[1] * bare)
        )
        print(
            f"| trainer, FGSM and a reading of {n}, {EPOCHS[1]} steps | +{both:.1%} (of medians) |",
            flush=True,
        )


def report_budget(
    steps: Mapping[str, Sequence[float]], spent: Mapping[int, Sequence[float]]
) -> None:
    """Each round counts as an epoch; the median step stands for all of its steps."""
    bare = statistics.median(steps["bare"])
    over = {
        kind: statistics.median(ratios(steps[name], steps["bare"])) - 1
        for name, kind in ATTACKS.items()
    }
    for count, found in spent.items():
        share = sum(found) / (len(found) * count * bare)
        made = (
            f"{sum(seconds > 0 for seconds in found)} readings of 64 in {len(found)} epochs of"
            f" {count} steps"
        )
        both = ", ".join(
            f"with trainer and {kind} {value + share:+.1%}" for kind, value in over.items()
        )
        print(f"| budget {BUDGET:.0%}: {made} | {share:.2%}; {both} |", flush=True)


def defaults(options: argparse.Namespace) -> None:
    pixels = cifar10(options.steps * BATCH, options.data_dir)[:2]
    paths = [Path("float32", False), Path("float32"), Path("bf16", False), Path("bf16")]
    seconds = in_turn({str(path): Subject(path, *pixels).bare for path in paths}, options.rounds)
    base = seconds[str(paths[0])]
    print("\n| path | images a CPU second | times the first (quartiles) |\n|---|---|---|")
    for name, found in seconds.items():
        speed = options.steps * BATCH / statistics.median(found)
        print(f"| {name} | {speed:.0f} | {spread(ratios(base, found), '{:.2f}')} |", flush=True)


def batches(options: argparse.Namespace) -> None:
    pixels = cifar10(4096, options.data_dir)[:2]
    sizes = (128, 256, 512, 1024, 2048, 4096)
    subjects = {str(size): Subject(Path(), *pixels, batch_size=size) for size in sizes}
    ways = {
        name: lambda s=s: s.trained(norm_batch_size=BATCH).fit() for name, s in subjects.items()
    }
    seconds = in_turn(ways, max(2, options.rounds // 3))
    print(
        "\n| batch (microbatch 128) | images a CPU second | times batch 128 (range)"
        " |\n|---|---|---|"
    )
    for name, found in seconds.items():
        speeds = ratios(seconds["128"], found)
        text = f"{statistics.median(speeds):.2f} ({min(speeds):.2f}-{max(speeds):.2f})"
        print(f"| {name} | {4096 / statistics.median(found):.0f} | {text} |", flush=True)


def allocation(options: argparse.Namespace) -> None:
    """The setting cannot be taken back, so each round is two new processes, one after the other."""
    found: dict[str, list[list[float]]] = {"given back": [], "kept": []}
    for _ in range(options.rounds):
        for name, flags in (("given back", ["--give-back"]), ("kept", [])):
            found[name].append(in_a_process(["--epoch", *flags], options))
    print(
        "\n| freed memory | CPU ms a step | times the first (quartiles) | page faults a step | peak"
        " MiB |"
    )
    print("|---|---|---|---|---|")
    base = [row[0] for row in found["given back"]]
    for name, rows in found.items():
        seconds, faults, high = (list(column) for column in zip(*rows, strict=True))
        speed = spread(ratios(seconds, base), "{:.2f}")
        text = (
            f"{1000 * statistics.median(seconds):.0f} | {speed} | {statistics.median(faults):.0f}"
        )
        print(f"| {name} | {text} | {statistics.median(high):.0f} |", flush=True)


def epoch(options: argparse.Namespace) -> None:
    """Seconds and page faults of a bare step, after one epoch to warm up, and the peak of this
    process in MiB."""
    subject = Subject(Path("float32"), *cifar10((options.steps + 2) * BATCH, options.data_dir)[:2])
    subject.bare()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    subject.bare()
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(
        subject.batches.step_seconds(),
        (after.ru_minflt - before) / (options.steps + 2),
        after.ru_maxrss / 1024,
    )


def memory(options: argparse.Namespace) -> None:
    """One process each, so that no peak hides another."""
    ways = ("bare", "trainer", "128", "64", "32")
    flags = ["--give-back"] if options.give_back else []
    peaks = {way: in_a_process(["--peak", way, *flags], options)[0] for way in ways}
    print("\n| way | peak resident MiB | over the bare loop |\n|---|---|---|")
    for way, peak in peaks.items():
        name = f"ABSA, FGSM, readings of {way}" if way.isdigit() else way
        print(f"| {name} | {peak:.0f} | {peak - peaks['bare']:+.0f} |", flush=True)


def in_a_process(flags: Sequence[str], options: argparse.Namespace) -> list[float]:
    """The numbers that this script prints in a process of its own."""
    command = [
        sys.executable,
        __file__,
        *flags,
        "--threads",
        str(options.threads),
        "--steps",
        str(options.steps),
    ]
    command += [] if options.data_dir is None else ["--data-dir", options.data_dir]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()]


def peak(way: str, options: argparse.Namespace) -> None:
    """Three epochs of four steps in float32; prints the peak of this process."""
    subject = Subject(Path("float32"), *cifar10(4 * BATCH, options.data_dir)[:2])
    for _ in range(3):
        if way == "bare":
            subject.bare()
        elif way == "trainer":
            subject.trained().fit()
        else:
            subject.trained(subject.attack("fgsm"), probe=subject.probe(int(way))).fit()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def resize(options: argparse.Namespace) -> None:
    images, targets, _ = cifar10(4096, options.data_dir)
    dataset = torch.utils.data.TensorDataset(images, targets)
    print("\n| batches | set_batch_size, median | worst | next batch |\n|---|---|---|---|")
    for stream in (hf.data.DeviceBatches(images, targets, 1), hf.data.AdaptiveBatches(dataset, 1)):
        times, sizes = [], range(1, 81)
        iterator = iter(stream)
        for size in sizes:
            started = time.perf_counter()
            stream.set_batch_size(size)
            times.append(time.perf_counter() - started)
            if len(next(iterator)[1]) != size:
                raise SystemExit(f"the batch after set_batch_size({size}) has another size")
        row = (
            f"{1e6 * statistics.median(times):.1f} us | {1e6 * max(times):.1f} us | the new size,"
            f" {len(sizes)} times"
        )
        print(f"| {type(stream).__name__} | {row} |", flush=True)


def profile(options: argparse.Namespace) -> None:
    pixels = cifar10(2 * BATCH, options.data_dir)[:2]
    for path in (Path("float32", False), Path("bf16")):
        subject = Subject(path, *pixels)
        subject.trained().fit()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            subject.trained().fit()
        events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        print(f"\n{path}, two steps\n\n| operation | share of the time | calls |\n|---|---|---|")
        for event in events[:8]:
            print(
                f"| `{event.key[:60]}` | {event.self_cpu_time_total / total:.1%} | {event.count} |",
                flush=True,
            )


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if not options.give_back:
        hf.keep_freed_memory()
    if options.peak is not None:
        peak(options.peak, options)
        return
    if options.epoch:
        epoch(options)
        return
    source = cifar10(1, options.data_dir)[2]
    print(
        f"ResNet-20, batch {BATCH}, {source}, torch {torch.__version__}, {options.threads}"
        " thread(s), ",
        end="",
    )
    print(f"{options.steps} steps a round, {options.rounds} rounds", flush=True)
    works = {
        f.__name__: f for f in (loop, price, defaults, batches, allocation, memory, resize, profile)
    }
    for part in options.parts:
        works[part](options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--precisions", nargs="+", choices=("float32", "bf16"), default=("float32", "bf16")
    )
    parser.add_argument("--steps", type=int, default=5, help="steps a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", default=None, help="folder with the CIFAR-10 binary archive")
    parser.add_argument(
        "--give-back",
        action="store_true",
        help="freed memory goes back to the system, as torch alone",
    )
    parser.add_argument("--peak", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--epoch", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
