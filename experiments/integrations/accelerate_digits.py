"""A hand-written loop on accelerate, on scikit-learn's digits, with a batch that follows curvature.

    python experiments/integrations/accelerate_digits.py [--passes 10]

The two lines that such a script needs, besides the import, are marked.
"""

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import TensorDataset

import hessianflow as hf
from hessianflow.integrations.accelerate import AdaptiveBatch


def main() -> None:
    """Train, and print the batch size at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=10)
    options = parser.parse_args()
    torch.manual_seed(0)
    accelerator = Accelerator()
    digits = hf.data.load("digits")
    assert isinstance(digits, hf.data.ImageSet)  # not a folder of files
    images = digits.images.float() / digits.value_scale
    data = TensorDataset(images, digits.targets)
    batches = hf.data.AdaptiveBatches(data, 16, device=accelerator.device)
    model = hf.models.create("digits-cnn", input_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    loss_fn = nn.CrossEntropyLoss()
    controller = hf.control.CriticalBatch(16, 256)
    steering = AdaptiveBatch(  # line 1
        accelerator, model, optimizer, batches, loss_fn, controller=controller
    )
    updates = 0
    for _ in range(options.passes):
        for inputs, targets in steering.batches:
            loss = loss_fn(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            steering.after_step(loss)  # line 2
    total = sum(parameter.double().sum().item() for parameter in model.parameters())
    print(f"batch {steering.batches.batch_size}, updates {updates}, weights {total:.10f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
