"""A plain training loop with one line that tells how near the loop is to instability.

    python experiments/integrations/monitor_in_a_loop.py [--updates 80]

The line is marked. Its figures can go to any logger; here they are printed.
"""

import argparse

import torch
from torch import nn

import hessianflow as hf


def main() -> None:
    """Train on the digits of scikit-learn, and print the figures after every 20 updates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=80)
    options = parser.parse_args()
    torch.manual_seed(0)
    digits = hf.data.load("digits")
    assert isinstance(digits, hf.data.ImageSet)  # not a folder of files
    images = digits.images.float() / digits.value_scale
    measured = images[:512], digits.targets[:512]
    model = hf.models.create("digits-cnn", input_size=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    loss_fn = nn.CrossEntropyLoss()
    for update in range(1, options.updates + 1):
        rows = torch.randint(len(images), (32,))
        optimizer.zero_grad()
        loss_fn(model(images[rows]), digits.targets[rows]).backward()
        optimizer.step()
        if update % 20 == 0:
            figures = hf.monitor(model, loss_fn, measured, optimizer)  # line 1
            shown = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
            print(f"update {update}: {shown}")


if __name__ == "__main__":
    main()
