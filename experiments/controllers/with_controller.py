"""Train like `hessianflow train`, under a controller that is written out in the settings instead of named.

    python -m experiments.controllers.with_controller SETTINGS.json RUN_DIR

SETTINGS.json holds the settings of `hessianflow train` and one more, "built": a class of `hessianflow.control` and its
arguments, e.g. {"class": "TimedSchedule", "batch_size": 128, "stages": [[2, 256]]}. A run directory that holds a
checkpoint is continued.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hessianflow as hf
from hessianflow.build import build_parts, build_probe, prepare
from hessianflow.choices import build_optimizer, build_scheduler, given
from hessianflow.config import TrainConfig, from_dict, to_dict
from hessianflow.interfaces import GradientObserver
from hessianflow.optim import GradientMoments
from hessianflow.training.record import SUMMARY, read_json

MOMENTS, EPOCH_LOSS = "small_gradient_sq", "epoch_loss"


class MeanLoss(nn.CrossEntropyLoss):
    """Cross-entropy that, as an observer, tells its mean over all training examples since it was last asked."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of one batch; those of evaluation, without gradients, are not counted."""
        loss: Tensor = super().forward(outputs, targets)
        if torch.is_grad_enabled():
            self.total += loss.detach().float() * len(targets)
            self.count += len(targets)
        return loss

    def on_microbatch(self, gradients: Sequence[Tensor], examples: int) -> None:
        """Not used."""

    def on_step(self, gradients: Sequence[Tensor], examples: int) -> None:
        """Not used."""

    def signals(self) -> Mapping[str, float]:
        """The mean; counting starts afresh."""
        mean = float(self.total / self.count)
        self.total.zero_()
        self.count.zero_()
        return {EPOCH_LOSS: mean}


def trainer_for(config: TrainConfig, built: dict[str, Any]) -> hf.AdaptiveBatchTrainer:
    """The trainer of `config` with the controller that `built` describes, and the observer that it needs."""
    config = prepare(config)
    parts = build_parts(config)
    optimizer = build_optimizer(config, parts.model)
    scheduler, unit = build_scheduler(config, optimizer, parts.train.num_examples)
    arguments = {name: value for name, value in built.items() if name != "class"}
    controller = getattr(hf.control, built["class"])(**arguments)
    loss = MeanLoss()
    measuring: dict[str, GradientObserver] = {MOMENTS: GradientMoments(), EPOCH_LOSS: loss}
    observers = [observer for name, observer in measuring.items() if name in controller.needs]
    return hf.AdaptiveBatchTrainer(
        parts.model,
        parts.train,
        parts.test,
        optimizer=optimizer,
        loss_fn=loss,
        controller=controller,
        epochs=given(config.epochs),
        scheduler=scheduler,
        schedule_unit=unit,
        probe=build_probe(config, parts),
        curvature="needed" if config.curvature == "needed" else "epoch",
        microbatch_size=config.microbatch_size,
        norm_batch_size=config.norm_batch_size,
        observers=observers,
        precision=config.precision or "float32",  # type: ignore[arg-type]
        run_dir=config.run_dir,
        config={"settings": to_dict(config), "built": built},
    )


def main(settings_file: str, run_dir: str) -> int:
    """Train or continue; 0 on success."""
    settings = json.loads(Path(settings_file).read_text("utf-8"))
    built = settings.pop("built")
    folder = Path(run_dir)
    if read_json(folder / SUMMARY).get("status") == "finished":
        return 0
    trainer = trainer_for(from_dict({**settings, "run_dir": run_dir}, settings_file), built)
    if (folder / "checkpoints").is_dir():
        trainer.resume(run_dir)
    else:
        trainer.fit()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
