"""A decoder that trains on a stream of text of unknown length and is resumed within the stream.

    python experiments/integrations/stream_of_text.py [--examples 4096]

The stream reads the source files of the standard library one after another. The run is stopped in
the middle and resumed, and it ends with the weights of an uninterrupted run.
"""

import argparse
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hessianflow as hf

BLOCK = 32


def blocks() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield blocks of bytes as inputs, and the next bytes as targets, file by file."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = torch.tensor(list(path.read_bytes()))
        for start in range(0, len(text) - BLOCK - 1, BLOCK):
            block = text[start : start + BLOCK + 1]
            yield block[:-1], block[1:]


class StopAfter:
    """A sink that asks its trainer to stop after an epoch."""

    trainer: hf.AdaptiveBatchTrainer

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def write(self, record: Mapping[str, Any]) -> None:
        """Ask the trainer to stop when the row of the epoch arrives."""
        if record["kind"] == "epoch" and record["epoch"] == self.epoch:
            self.trainer.request_stop()

    def close(self) -> None:
        """Do nothing, because there is nothing to close."""


def trainer(
    examples: int, run_dir: Path | None = None, sinks: Sequence[StopAfter] = ()
) -> hf.AdaptiveBatchTrainer:
    """Return a trainer that records and decides every 512 blocks."""
    torch.manual_seed(0)
    model = hf.models.create("gpt-tiny", num_classes=256, input_size=BLOCK)
    options: dict[str, Any] = {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.002),
        "loss_fn": nn.CrossEntropyLoss(),
        "controller": hf.control.AdaBatch(16, 64, every_epochs=2),
    }
    return hf.AdaptiveBatchTrainer(
        model,
        hf.data.StreamBatches(blocks, 16),
        max_examples=examples,
        every=hf.training.Every(examples=512),
        run_dir=run_dir,
        reporting=hf.training.Reporting(sinks),
        **options,
    )


def main() -> None:
    """Train, stop, resume, and print whether the weights equal those of an uninterrupted run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=4096)
    options = parser.parse_args()
    whole = trainer(options.examples)
    history = whole.fit()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        stop = StopAfter(epoch=2)
        stop.trainer = trainer(options.examples, run_dir, [stop])
        stop.trainer.fit()
        resumed = trainer(options.examples)
        resumed.resume(run_dir)
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    is_equal = all(torch.equal(one, other) for one, other in pairs)
    sizes = [row["batch_size"] for row in history.epochs]
    print(f"batches {sizes}, resumed run equal: {is_equal}")


if __name__ == "__main__":
    main()
