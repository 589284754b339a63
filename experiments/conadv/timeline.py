"""Draws where the time of a few ConAdv steps goes, with the attack in turn with training and in a
second process.

    OMP_NUM_THREADS=1 python -m experiments.conadv.timeline [--steps 4] [--out
    experiments/conadv/timeline.png]

The spans are torch.profiler's, of both processes, on the clock they share. Profiling slows the
steps down: the figures to quote are those of experiments/benchmarks/overlap.py.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile, record_function

import hessianflow as hf

Span = tuple[str, float, float]
"""What, from when, to when, in seconds."""
LABELS = ("attack", "start the attack, take the twins", "gradient", "optimizer step")


def spans(profiler: Any) -> list[Span]:
    """The labelled ranges of a profile, on the wall clock."""
    started = profiler.profiler.kineto_results.trace_start_ns() / 1e9
    return [
        (event.name, started + event.time_range.start / 1e6, started + event.time_range.end / 1e6)
        for event in profiler.events()
        if event.name in LABELS
    ]


class Labelled(hf.adversarial.FGSM):
    """Marks its passes for the profiler of the process it runs in."""

    def perturb(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        share: float,
        microbatch_size: int | None = None,
    ) -> Tensor:
        """As FGSM."""
        with record_function("attack"):
            return super().perturb(model, inputs, targets, share, microbatch_size)


class Profiled(Labelled):
    """Profiles itself, for a process that has no profiler; the spans come back with its state."""

    found: Sequence[Any] = ()

    def perturb(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        share: float,
        microbatch_size: int | None = None,
    ) -> Tensor:
        """As FGSM."""
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            result = super().perturb(model, inputs, targets, share, microbatch_size)
        self.found = [*self.found, *spans(profiler)]
        return result

    def state_dict(self) -> dict[str, Any]:
        """With the spans."""
        return {**super().state_dict(), "spans": self.found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """With the spans."""
        super().load_state_dict(state)
        self.found = state["spans"]


def run(attack: hf.adversarial.FGSM, runner: hf.adversarial.AttackRunner, steps: int) -> list[Span]:
    """Spans of the training process over the last steps of a few."""
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.rand(128, 3, 32, 32, generator=generator),
        torch.randint(0, 10, (128,), generator=generator),
    )
    model = hf.normalisation.split_batch_norm(hf.models.create("resnet20", num_classes=10).train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    adversary = hf.adversarial.ConcurrentAdversary(attack, staleness=1, runner=runner)
    ahead = hf.training.Ahead(repeat((x, y)), adversary, model)
    exposures = iter(ahead)

    def step() -> None:
        with record_function("start the attack, take the twins"):
            exposure = next(exposures)
        with record_function("gradient"):
            optimizer.zero_grad()
            hf.training.exposed_loss(model, exposure, cross_entropy).backward()
        with record_function("optimizer step"):
            optimizer.step()

    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    ahead.state_dict()  # waits for the attack under way
    return spans(profiler)


def draw(panels: Mapping[str, Mapping[str, Sequence[Span]]], path: Path) -> None:
    """A panel a way, a line a process."""
    from hessianflow.plots import style

    figure = style.new_figure(9, 3.6)
    for axes, (title, lines) in zip(
        figure.subplots(len(panels), 1, sharex=True), panels.items(), strict=True
    ):
        begin = min(start for _, start, _ in next(iter(lines.values())))
        for place, found in enumerate(lines.values()):
            for name, start, end in found:
                if end > begin:
                    colour = style.colour(LABELS.index(name))
                    axes.barh(
                        place, end - start, left=start - begin, height=0.7, color=colour, label=name
                    )
        axes.set_yticks(range(len(lines)), list(lines))
        axes.set_title(title)
        axes.set_xlim(left=0)
        style.finish(axes, "", "")
    axes.set_xlabel("seconds")
    shown = {
        label: bar
        for a in figure.axes
        for bar, label in zip(*a.get_legend_handles_labels(), strict=True)
    }
    figure.legend(shown.values(), shown.keys(), fontsize=7, loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("timeline.png"))
    options = parser.parse_args()
    adversary: dict[str, Any] = {"eps": 0.005, "value_range": (0.0, 1.0)}
    turn = run(Labelled(**adversary), hf.adversarial.Interleaved(), options.steps)
    there = Profiled(**adversary)
    beside = run(there, hf.adversarial.WorkerProcess(), options.steps)
    panels: dict[str, Mapping[str, Sequence[Span]]] = {
        "attack in turn with training": {"training": turn},
        "attack in a second process": {"training": beside, "attacking": there.found},
    }
    draw(panels, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
