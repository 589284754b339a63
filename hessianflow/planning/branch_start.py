"""The start of branches in a run directory: its data, and one of its checkpoints."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hessianflow.batches import split
from hessianflow.choices import build_optimizer
from hessianflow.config import RunConfig
from hessianflow.interfaces import HessianFlowError
from hessianflow.parts import (
    EVALUATION_BATCH,
    Parts,
    build_parts,
    find_checkpoint,
    load_config,
    on_this_machine,
    resolved_precision,
)
from hessianflow.planning.branches import Start
from hessianflow.runs import checkpoints
from hessianflow.runs.names import BEST, CHECKPOINTS
from hessianflow.runs.optimizer_states import check_optimizer
from hessianflow.runs.states import DamagedStateError, check_training_state, restoring
from hessianflow.training import Passes, checkpoint

EVALUATED = 1024
"""Training examples whose loss is compared. This default is our choice."""

APART = 1000
"""Epochs between the data of two repeats, more than any window is long. Our choice."""


@dataclass(frozen=True)
class RunStart:
    """A checkpoint of a run from which branches can start.

    Attributes:
        config: settings of the run.
        parts: model and data of the run.
        file: checkpoint file.
        state: content of that file.
        lr: rate of the first parameter group at the batch size of the checkpoint; None: the one
            in force there.
    """

    config: RunConfig
    parts: Parts
    file: Path
    state: Mapping[str, Any]
    lr: float | None = None

    @property
    def epoch(self) -> int:
        """Return the number of completed epochs."""
        return int(self.state["counters"]["epoch"])

    @property
    def batch_size(self) -> int:
        """Return the batch size in force."""
        return int(self.state["decision"]["batch_size"])

    @property
    def rate(self) -> float:
        """Return the rate of the first parameter group at that batch size."""
        return self._rates()[0]

    def __call__(self, repeat: int) -> Start:
        """Return the start of a repeat, whose examples are in an order of its own."""
        torch.manual_seed(self.config.seed + repeat)
        source = str(self.file)
        with restoring(source):
            checkpoint.load_model(self.parts.model, self.state["model"], source)
            optimizer = build_optimizer(self.config, self.parts.model)
            check_optimizer(optimizer, self.state["optimizer"])
            # torch takes the tensors themselves, and a step would change those of the checkpoint.
            optimizer.load_state_dict(copy.deepcopy(self.state["optimizer"]))
            for group, rate in zip(optimizer.param_groups, self._rates(), strict=True):
                group["lr"] = rate
            position = dict(self.state["parts"]["train_data"])
            if repeat > 0:
                position.update(epoch=position["epoch"] + APART * repeat, cursor=0)
            self.parts.train.load_state_dict(position)
        return Start(
            self.parts.model,
            optimizer,
            self.parts.train,
            self.batch_size,
            nn.CrossEntropyLoss(),
            self._evaluated(),
            self._passes(),
            self.config.batch_size,
        )

    def _rates(self) -> list[float]:
        """Return the rate of each parameter group at the batch size of the checkpoint."""
        with restoring(str(self.file)):
            factor = float(self.state["decision"]["lr_factor"])
            groups = self.state["optimizer"]["param_groups"]
            rates = [factor * float(group["lr"]) for group in groups]
            if not rates:
                raise DamagedStateError(f"{self.file}: its optimizer has no parameter group")
        if self.lr is None:
            return rates
        if not rates[0] > 0:
            return [self.lr] * len(rates)
        return [self.lr * rate / rates[0] for rate in rates]

    def _evaluated(self) -> Iterable[Any]:
        count = min(EVALUATED, self.parts.train.num_examples)
        size = EVALUATION_BATCH.get(self.parts.train.device.type, 1000)
        return list(split(self.parts.train.sample(count, self.config.seed), size))

    def _passes(self) -> Passes:
        config = self.config
        norm_batch_size = config.norm_batch_size
        if norm_batch_size == "ranks":
            norm_batch_size = 0
        return Passes(
            microbatch_size=config.microbatch_size,
            norm_batch_size=norm_batch_size,
            norm_statistics=config.norm_statistics,
            precision=resolved_precision(config),
        )


def find_start(path: str | Path, epoch: int | None = None, lr: float | None = None) -> RunStart:
    """Return the start of branches of a run.

    Args:
        path: run directory, or a checkpoint inside one.
        epoch: completed epochs of the checkpoint to take; None: the newest, or the one named.
        lr: rate at the batch size of the checkpoint; None: the one in force there.

    Raises:
        HessianFlowError: There is no such checkpoint, the data are gone, the run had a parameter
            server, or its rate is 0.
    """
    run_dir, file = find_checkpoint(path)
    config = on_this_machine(load_config(run_dir))
    if config.is_dual_batch:
        raise HessianFlowError(
            f"{run_dir} is a run of dual-batch, whose workers have batches of their own: there is"
            " no one batch size to branch"
        )
    state: Mapping[str, Any]
    if epoch is None:
        state = checkpoints.load_checked(file, check_training_state)
    else:
        file, state = _of_epoch(run_dir / CHECKPOINTS, epoch)
    start = RunStart(config, build_parts(config), file, state, lr)
    if not start.rate > 0:
        raise HessianFlowError(
            f"the learning rate at {file} is {start.rate:g}, so branches would stand still: name an"
            " earlier one with --epoch, or a rate with --lr"
        )
    return start


def _of_epoch(folder: Path, epoch: int) -> tuple[Path, Mapping[str, Any]]:
    """Return the file and the content of the checkpoint at the end of an epoch."""
    found = []
    # The best one is a copy of another, unless that is no longer kept.
    for file in sorted(folder.glob("*.pt"), key=lambda path: (path.name == BEST, path.name)):
        state = checkpoints.load_checked(file, check_training_state)
        counters = state["counters"]
        if counters.get("epoch") == epoch and counters.get("place", 0) == 0:
            return file, state
        found.append(counters.get("epoch"))
    there = ", ".join(map(str, sorted(set(filter(None, found))))) or "none"
    raise HessianFlowError(
        f"--epoch {epoch}: no checkpoint in {folder} is of that epoch; there is {there} (a run with"
        " a larger --keep-checkpoints keeps more)"
    )
