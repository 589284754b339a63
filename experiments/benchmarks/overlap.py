"""How much of an attack is hidden behind training, when it runs in a second process or on a second
CUDA stream.

    OMP_NUM_THREADS=1 python experiments/benchmarks/overlap.py [--rounds 12] [--steps 6] [--device
    cuda]

Three ways take turns, a block of consecutive steps each: training on clean rows and twins that are
given (no attack at all), with the attack in turn with training, and with the attack beside it. The
first step of a block is not counted: its twins were made before. The part of the attack that is
hidden, from medians over rounds, is measured twice:

- by the whole step: 1 - (beside - none) / (in turn - none);
- by what the training process does for the attack itself (start it, hand over the weights, wait for
  the twins): 1 - beside / in turn. Other programs on the machine disturb this less. On a GPU, where
  the host never waits, it says nothing.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hessianflow as hf
from hessianflow.interfaces import Exposure

EPS, RANGE = 0.005, (0.0, 1.0)
Timed = tuple[float, float, float]
"""Wall and processor seconds of a step, and the wall seconds of them that are for the attack."""


def stepper(
    model: torch.nn.Module, x: Tensor, y: Tensor, runner: hf.adversarial.AttackRunner | None
) -> Callable[[], float]:
    """A training step on clean rows and twins; without a runner these are given. Returns the
    attack's seconds."""
    model = hf.normalisation.split_batch_norm(copy.deepcopy(model))
    twin_mode = partial(hf.normalisation.clean_rows, model, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    attack = hf.adversarial.FGSM(EPS, value_range=RANGE)
    twins = attack.perturb(model, x, y, 1.0)
    exposures = repeat(Exposure((x, y), (twins, y), twin_mode))
    if runner is not None:
        adversary = hf.adversarial.ConcurrentAdversary(attack, staleness=1, runner=runner)
        exposures = iter(hf.training.Ahead(repeat((x, y)), adversary, model))

    def step() -> float:
        began = time.perf_counter()
        exposure = next(exposures)
        seconds = time.perf_counter() - began
        optimizer.zero_grad()
        hf.training.exposed_loss(model, exposure, cross_entropy).backward()
        optimizer.step()
        return seconds

    return step


def block(step: Callable[[], float], steps: int, wait: Callable[[], None]) -> list[Timed]:
    """The times of consecutive steps but the first."""
    step()
    found = []
    for _ in range(steps):
        wait()
        wall, cpu = time.perf_counter(), time.process_time()
        attack = step()
        wait()
        found.append((time.perf_counter() - wall, time.process_time() - cpu, attack))
    return found


def measure(
    ways: dict[str, Callable[[], float]], rounds: int, steps: int, device: str
) -> dict[str, list[Timed]]:
    """The median step of every block, one entry a round."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    found: dict[str, list[Timed]] = {name: [] for name in ways}
    names = list(ways)
    for index in range(-1, rounds):  # one to warm up
        for name in names[index % len(names) :] + names[: index % len(names)]:
            times = block(ways[name], steps, wait)
            if index >= 0:
                wall, cpu, attack = (statistics.median(each) for each in zip(*times, strict=True))
                found[name].append((wall, cpu, attack))
    return found


def medians(times: dict[str, list[Timed]], clock: int) -> list[float]:
    """Of every way, over rounds, in milliseconds: differences within a round are lost in a shared
    machine's noise."""
    return [1000 * statistics.median(each[clock] for each in values) for values in times.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=6, help="a block")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(options.batch_size, 3, 32, 32, generator=generator).to(options.device)
    y = torch.randint(0, 10, (options.batch_size,), generator=generator).to(options.device)
    model = hf.models.create(options.model, num_classes=10).to(options.device).train()
    beside = (
        hf.adversarial.SecondStream()
        if options.device == "cuda"
        else hf.adversarial.WorkerProcess()
    )
    ways = {
        "twins given, no attack": stepper(model, x, y, None),
        "attack in turn": stepper(model, x, y, hf.adversarial.Interleaved()),
        "attack beside": stepper(model, x, y, beside),
    }
    load = os.getloadavg()[0]
    times = measure(ways, options.rounds, options.steps, options.device)
    print(
        f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} thread(s),"
        f" {options.model}, batch {options.batch_size}, {options.rounds} rounds, load average"
        f" {load:.1f} to {os.getloadavg()[0]:.1f}\n"
    )
    print(
        "| step | wall ms | processor ms of the training process | wall ms for the attack | ratio"
        " of wall times |"
    )
    print("| --- | --- | --- | --- | --- |")
    wall, cpu, attack = (medians(times, clock) for clock in range(3))
    for name, *figures in zip(times, wall, cpu, attack, strict=True):
        print(
            f"| {name} | "
            + " | ".join(f"{value:.1f}" for value in figures)
            + f" | {figures[0] / wall[0]:.2f} |"
        )
    print(f"\nhidden, by the whole step: {1 - (wall[2] - wall[0]) / (wall[1] - wall[0]):.0%}")
    if options.device == "cpu":
        print(
            "hidden, by what the training process does for the attack:"
            f" {1 - attack[2] / attack[1]:.0%}"
        )


if __name__ == "__main__":
    main()
