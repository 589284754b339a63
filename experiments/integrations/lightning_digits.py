"""Lightning on the digits of scikit-learn, with a batch that follows the curvature.

    python experiments/integrations/lightning_digits.py [--passes 10]

The two lines that a script with Lightning needs are marked.
"""

import argparse
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hessianflow as hf
from hessianflow.integrations.lightning import AdaptiveBatch, batches  # line 1


class Digits(LightningModule):  # type: ignore[misc]
    """A small network of the package."""

    def __init__(self) -> None:
        super().__init__()
        self.net = hf.models.create("digits-cnn", input_size=8)

    def forward(self, images: Tensor) -> Any:
        """Return the scores of the classes."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        del batch_idx
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    """Train, and print the batch size at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=10)
    options = parser.parse_args()
    torch.manual_seed(0)
    digits = hf.data.load("digits")
    assert isinstance(digits, hf.data.ImageSet)  # not a folder of files
    images = digits.images.float() / digits.value_scale
    module = Digits()
    adaptive = AdaptiveBatch(nn.CrossEntropyLoss(), controller=hf.control.CriticalBatch(16, 256))
    trainer = Trainer(
        max_epochs=options.passes,
        accelerator="cpu",
        callbacks=[adaptive],  # line 2
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = batches(TensorDataset(images, digits.targets), 16)  # instead of a DataLoader
    trainer.fit(module, data)
    total = sum(parameter.double().sum().item() for parameter in module.parameters())
    print(f"batch {data.batch_size}, updates {trainer.global_step}, weights {total:.10f}")


if __name__ == "__main__":
    main()
