"""How many products does the leading eigenvalue of a network take, cold and as a probe reads it?

    OMP_NUM_THREADS=1 python experiments/benchmarks/eigen_products.py [--networks ...] [--starts 5]

Prints one Markdown row a network: products of random starts at three tolerances, mean over starts
and points of training, and of the probe's readings (a cold one first, then warm ones). Networks and
starts are the same at each revision, so two runs, one of them with PYTHONPATH at another checkout,
are paired.
"""

import argparse
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pixels import cifar10
from torch import Tensor, nn

import hessianflow as hf

TOLERANCES = (1e-2, 1e-3, 1e-4)


class Network(NamedTuple):
    """What is trained and when it is looked at.

    Attributes:
        model: by name, see `made`.
        points: steps after which cold searches are made.
        readings: of the probe.
        every: steps between two readings.
        examples: in the batch that is measured.
    """

    model: str
    points: tuple[int, ...]
    readings: int
    every: int
    examples: int


NETWORKS = {
    "digits-relu": Network("relu", (30, 150, 600, 2000), 40, 50, 256),
    "digits-tanh": Network("tanh", (0, 30, 150, 600, 2000), 40, 50, 256),
    "resnet8": Network("resnet8", (10, 60, 200), 10, 20, 128),
    "resnet20": Network("resnet20", (30, 60), 6, 10, 64),
    "squeezenext": Network("squeezenext-1.0-23", (20, 40), 5, 8, 64),
}


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The untrained network with its data: digits for the small ones, else CIFAR-10 images."""
    torch.manual_seed(0)
    if name in ("relu", "tanh"):
        found = hf.data.load("digits")
        pixels = (found.images.float() / found.value_scale).flatten(1)
        act = nn.ReLU if name == "relu" else nn.Tanh
        layers = (nn.Linear(64, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, 10))
        return nn.Sequential(*layers), pixels, found.targets.long()
    images, targets, _ = cifar10(4000)
    model = hf.models.create(name, num_classes=10, input_size=32, variant="cifar")
    return model, (images.float() / 255 - 0.5) / 0.25, targets


def looked_at(network: Network) -> Iterator[tuple[int, nn.Module, tuple[Tensor, Tensor]]]:
    """The network, step by step, with the batch that is measured."""
    model, inputs, targets = made(network.model)
    batch = (inputs[: network.examples], targets[: network.examples])
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    source = torch.Generator().manual_seed(0)
    for step in range(max(*network.points, network.readings * network.every) + 1):
        yield step, model, batch
        model.train()
        rows = torch.randint(0, len(targets), (64,), generator=source)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()


def measured(network: Network, starts: int) -> tuple[dict[float, list[int]], list[int]]:
    """Products of cold searches by tolerance, and of the probe's readings."""
    cold: dict[float, list[int]] = {tol: [] for tol in TOLERANCES}
    readings: list[int] = []
    probe: Any = None
    for step, model, batch in looked_at(network):
        probe = probe or hf.curvature.CurvatureProbe(model, nn.functional.cross_entropy, batch)
        if step % network.every == 0 and len(readings) < network.readings:
            readings.append(probe().matvecs)
        if step in network.points:
            operator = hf.curvature.HessianOperator(model, nn.functional.cross_entropy, batch)
            for tol in TOLERANCES:
                for seed in range(starts):
                    found = hf.curvature.top_eigenpairs(operator, tol=tol, seed=seed)
                    cold[tol].append(found.matvecs)
            operator.release()
    return cold, readings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--starts", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = " | ".join(f"{tol:g}" for tol in TOLERANCES)
    print(f"| network | {names} | probe |\n|---|---|---|---|---|")
    for name in options.networks:
        cold, readings = measured(NETWORKS[name], options.starts)
        cells = [statistics.mean(counts) for counts in (*cold.values(), readings)]
        print(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
    main()
