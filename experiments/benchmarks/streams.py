"""Measure what a stream of unknown length costs over a bare loop and how much memory it keeps, and
check that it is resumed without a repeat.

    OMP_NUM_THREADS=1 python experiments/benchmarks/streams.py [--examples 1000000] [--batch 256]
    [--pieces 40]

The stream gives vectors of 64 numbers and a class, made as it is read. Both sides take a real
training step on every batch (two hidden layers of `--width`, SGD with momentum). They take turns of
one piece of the stream each, on their own iterators over the same data: a bare loop over a
`DataLoader`, and `hf.data.StreamBatches` of the same batch size. The table gives the median and the
quartiles of the ratios of the pieces, in CPU seconds of the process. Resident memory is read after
every piece. Then the stream is stopped in the middle and resumed at another batch size, once by
counting and once from its own state. The numbers of the examples that both parts handed out are
compared with 0, 1, 2, ...
"""

import argparse
import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paired import ratios, spread, timed
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import hessianflow as hf

FEATURES = 64


class Made(IterableDataset):
    """Examples made as they are read; the class is the number of the example modulo 10."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.place = 0

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        block = torch.randn(4096, FEATURES, generator=torch.Generator().manual_seed(0))
        for number in range(self.place, self.count):
            yield block[number % 4096] + 0.1, number % 10


class Numbers(IterableDataset):
    """The numbers of the examples, with a state of their own."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.place = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        while self.place < self.count:
            self.place += 1
            yield self.place - 1, 0
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        """Return the number of examples given."""
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the examples given."""
        self.place = state["place"]


class Subject:
    """A network with its optimizer, and an iterator over its batches."""

    def __init__(self, batches: Iterable[Any], width: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(FEATURES, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 10),
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.loss_fn = nn.CrossEntropyLoss()
        self.batches = iter(batches)
        self.examples = 0

    def train(self, steps: int) -> None:
        """Take training steps as a bare loop does."""
        for inputs, targets in itertools.islice(self.batches, steps):
            self.optimizer.zero_grad()
            self.loss_fn(self.model(inputs), targets).backward()
            self.optimizer.step()
            self.examples += len(targets)


def resident() -> float:
    """Return the resident memory of this process in MiB, NaN where the system does not tell."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def compare(options: argparse.Namespace) -> None:
    """Print the cost of a stream over a bare loop, and the memory that the process holds."""
    bare = Subject(DataLoader(Made(options.examples), options.batch), options.width)
    stream = Subject(hf.data.StreamBatches(Made(options.examples), options.batch), options.width)
    steps = -(-options.examples // (options.batch * options.pieces))
    seconds: dict[str, list[float]] = {"bare": [], "stream": []}
    memory = []
    for number in range(options.pieces):
        order = [("bare", bare), ("stream", stream)]
        for name, subject in order[:: -1 if number % 2 else 1]:
            seconds[name].append(timed(partial(subject.train, steps))[0])
        memory.append(resident())
    assert bare.examples == stream.examples == options.examples
    step = 1000 * sum(seconds["bare"][1:-1]) / (steps * (options.pieces - 2))
    print(f"| examples | {options.examples}, batch {options.batch}, {options.pieces} pieces |")
    print(f"| bare step | {step:.2f} ms |")
    pieces = slice(1, -1)  # the first warms up, and the last is shorter
    found = spread(ratios(seconds["stream"][pieces], seconds["bare"][pieces]))
    print(f"| stream over the bare loop | {found} |")
    print(
        f"| resident MiB after the first piece, in the middle, at the end | {memory[0]:.1f},"
        f" {memory[len(memory) // 2]:.1f}, {memory[-1]:.1f} |"
    )


def resume(options: argparse.Namespace, by_count: bool) -> None:
    """Stop a stream in the middle, resume it, and check that it gives every example once."""

    def stream(batch_size: int) -> hf.data.StreamBatches:
        return hf.data.StreamBatches(Numbers(options.examples), batch_size, by_count=by_count)

    first = stream(options.batch)
    seen: list[Tensor] = []
    for numbers, _ in first:
        seen.append(numbers)
        if first.cursor > options.examples // 2:
            break
    second = stream(options.batch)
    second.load_state_dict(first.state_dict())
    second.set_batch_size(3 * options.batch + 1)
    rest = iter(second)
    first_batch, (numbers, _) = timed(lambda: next(rest))
    seen += [numbers, *(numbers for numbers, _ in rest)]
    whole = torch.equal(torch.cat(seen), torch.arange(options.examples))
    if not whole:
        raise SystemExit("the resumed stream repeats or lacks examples")
    how = "counting" if by_count else "its own state"
    print(
        f"| resumed by {how} at example {first.cursor} | every example once, in order; first batch"
        f" after {first_batch:.2f} s |"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--pieces", type=int, default=40)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    print("| what | measured |\n|---|---|")
    compare(options)
    resume(options, by_count=True)
    resume(options, by_count=False)


if __name__ == "__main__":
    main()
