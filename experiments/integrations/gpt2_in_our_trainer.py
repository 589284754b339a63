"""A small GPT-2 of transformers in the trainer of this package, on padded lines of text.

    python experiments/integrations/gpt2_in_our_trainer.py [--updates 120]

The model computes its own loss, which ignores padding (label -100). The run counts updates, and a
controller decides after every tenth of them. The weights are random and the text comes from the
standard library, so nothing is downloaded.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel

import hessianflow as hf

LONGEST = 48


def lines(count: int) -> list[torch.Tensor]:
    """Return lines of a module of the standard library as bytes."""
    text = Path(argparse.__file__).read_text(encoding="utf-8").splitlines()
    kept = [line.strip().encode()[:LONGEST] for line in text if len(line.strip()) > 8]
    return [torch.tensor(list(line)) for line in kept[:count]]


def padded(items: list[torch.Tensor]) -> dict[str, Any]:
    """Return a batch, padded to its longest line."""
    return {
        "input_ids": pad_sequence(items, batch_first=True),
        "labels": pad_sequence(items, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(item) for item in items], True),
    }


def main() -> None:
    """Train, and print the batch sizes, the first loss and the last one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=120)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_positions=LONGEST, n_embd=32, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config)
    loss_fn = hf.ModelLoss()
    data = hf.data.AdaptiveBatches(lines(1024), 16, collate_fn=padded)  # type: ignore[arg-type]
    history = hf.AdaptiveBatchTrainer(
        model,
        data,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.003),
        loss_fn=loss_fn,
        max_updates=options.updates,
        every=hf.training.Every(updates=options.updates // 10),
        controller=hf.control.ABS(16, 64, patience=3),
        probe=hf.curvature.CurvatureProbe(model, loss_fn, data.sample(64)),
        passes=hf.training.Passes(microbatch_size=16),
    ).fit()
    sizes = [row["batch_size"] for row in history.epochs]
    losses = [history.epochs[place]["train_loss"] for place in (0, -1)]
    print(f"batches {sizes}, loss {losses[0]:.3f} -> {losses[1]:.3f}")


if __name__ == "__main__":
    main()
