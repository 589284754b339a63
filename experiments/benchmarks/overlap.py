"""How much of an attack is hidden behind training, when it runs in a second process or on a second CUDA stream.

    OMP_NUM_THREADS=1 python experiments/benchmarks/overlap.py [--rounds 12] [--steps 6] [--device cuda]

Three ways take turns, a block of consecutive steps each: training on clean rows and twins that are given (no attack at
all), with the attack in turn with training, and with the attack beside it. The first step of a block is not counted:
its twins were made before. Hidden: the part of the attack's time that the step beside it does not show,
1 - (beside - none) / (in turn - none) of the medians: in wall time, and in the processor time of the training process,
which other programs on the machine disturb less but which does not count waiting.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hessianflow as hf

EPS, RANGE = 0.005, (0.0, 1.0)
Timed = tuple[float, float]
"""Wall and processor seconds of a step."""


def stepper(
    model: torch.nn.Module, x: Tensor, y: Tensor, runner: hf.adversarial.AttackRunner | None
) -> Callable[[], None]:
    """A training step on clean rows and twins; without a runner the twins are given."""
    model = hf.adversarial.split_batch_norm(copy.deepcopy(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    attack = hf.adversarial.FGSM(EPS, value_range=RANGE)
    given = hf.adversarial.Pair(x, y, attack.perturb(model, x, y, 1.0), 0, 0)
    ahead = hf.adversarial.ConcurrentAdversary(attack, staleness=1, runner=runner)
    ahead.prime(x, y)

    def step() -> None:
        pair = given if runner is None else ahead.step(model, x, y)
        optimizer.zero_grad()
        hf.adversarial.pair_loss(model, pair, cross_entropy).total.backward()
        optimizer.step()

    return step


def block(step: Callable[[], None], steps: int, wait: Callable[[], None]) -> list[Timed]:
    """The times of consecutive steps but the first."""
    step()
    found = []
    for _ in range(steps):
        wait()
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        wait()
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return found


def measure(ways: dict[str, Callable[[], None]], rounds: int, steps: int, device: str) -> dict[str, list[Timed]]:
    """The median step of every block, one entry a round."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    found: dict[str, list[Timed]] = {name: [] for name in ways}
    names = list(ways)
    for index in range(-1, rounds):  # one to warm up
        for name in names[index % len(names) :] + names[: index % len(names)]:
            times = block(ways[name], steps, wait)
            if index >= 0:
                found[name].append((statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)))
    return found


def hidden(times: dict[str, list[Timed]], clock: int) -> float:
    """The hidden part, from medians over rounds: a round's own difference is lost in the noise of a shared machine."""
    none, turn, beside = (statistics.median(each[clock] for each in values) for values in times.values())
    return 1 - (beside - none) / (turn - none)


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
    beside = hf.adversarial.SecondStream() if options.device == "cuda" else hf.adversarial.WorkerProcess()
    ways = {
        "twins given, no attack": stepper(model, x, y, None),
        "attack in turn": stepper(model, x, y, hf.adversarial.Interleaved()),
        "attack beside": stepper(model, x, y, beside),
    }
    load = os.getloadavg()[0]
    times = measure(ways, options.rounds, options.steps, options.device)
    print(
        f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} thread(s), {options.model}, batch "
        f"{options.batch_size}, {options.rounds} rounds, load average {load:.1f} to {os.getloadavg()[0]:.1f}\n"
    )
    print("| step | wall ms, median (fastest) | processor ms of the training process | ratio of wall times |")
    print("| --- | --- | --- | --- |")
    base = times["twins given, no attack"]
    for name, values in times.items():
        wall, cpu = [1000 * each[0] for each in values], [1000 * each[1] for each in values]
        ratio = statistics.median(a[0] / b[0] for a, b in zip(values, base, strict=True))
        print(
            f"| {name} | {statistics.median(wall):.1f} ({min(wall):.1f}) | {statistics.median(cpu):.1f} | {ratio:.2f} |"
        )
    for clock, label in enumerate(("wall time", "processor time of the training process")):
        print(f"\nhidden, {label}: {hidden(times, clock):.0%}")


if __name__ == "__main__":
    main()
