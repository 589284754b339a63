"""A small BERT that tells lines of two Python modules apart; its batch follows the curvature.

    python experiments/integrations/transformers_bert.py [--passes 6]

The two lines that a script with the Trainer of transformers needs are marked. The weights are
random and the text comes from the standard library, so nothing is downloaded.
"""

import _pydecimal
import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import hessianflow as hf
from hessianflow.integrations.transformers import AdaptiveTrainer as Trainer  # line 1

LONGEST = 64


def lines(count: int) -> list[dict[str, Any]]:
    """Return lines of the two modules as bytes, in alternation."""
    examples: list[list[dict[str, Any]]] = []
    for label, module in enumerate((argparse, _pydecimal)):
        text = Path(str(module.__file__)).read_text(encoding="utf-8").splitlines()
        kept = [line.strip().encode()[:LONGEST] for line in text if len(line.strip()) > 8]
        examples.append([{"ids": list(line), "label": label} for line in kept[: count // 2]])
    return [example for pair in zip(*examples, strict=True) for example in pair]


def padded(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch, padded to its longest line."""
    ids = [torch.tensor(item["ids"]) for item in items]
    batch = {"input_ids": pad_sequence(ids, batch_first=True)}
    batch["attention_mask"] = (batch["input_ids"] > 0).long()
    batch["labels"] = torch.tensor([item["label"] for item in items])
    return batch


def main() -> None:
    """Train, and print the batch sizes and the last losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--examples", type=int, default=1024)
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=256, intermediate_size=64, **sizes)
    model = BertForSequenceClassification(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=options.passes,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            logging_steps=8,
            save_strategy="no",
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=lines(options.examples),
            data_collator=padded,
            every=256,
            controller=hf.control.CriticalBatch(16, 128),  # line 2
        )
        trainer.train()
    sizes_logged = [row["batch/size"] for row in trainer.state.log_history if "batch/size" in row]
    total = sum(parameter.double().sum().item() for parameter in model.parameters())
    print(f"batches {sizes_logged}, updates {trainer.state.global_step}, weights {total:.10f}")


if __name__ == "__main__":
    main()
