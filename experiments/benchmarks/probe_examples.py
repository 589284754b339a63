"""How many examples and what tolerance does a curvature reading need?

    OMP_NUM_THREADS=1 python experiments/benchmarks/probe_examples.py

ResNet-8 trains on 3,840 CIFAR-10 images in bf16 (batch 128, rate 0.1, a fifth of it from epoch 9).
After every epoch each warm-started probe reads the top eigenvalue; the reference of the same
examples is a cold start at tolerance 1e-4. Printed: the references (products), then products,
relative error and CPU seconds of every probe.
"""

import argparse
import time

import torch
from pixels import cifar10
from torch import nn

import hessianflow as hf

SIZES, TOLERANCES = (128, 64, 32), (0.01, 0.05, 0.1)


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    images, targets, source = cifar10(options.images, options.data_dir)
    torch.manual_seed(0)
    model = hf.models.create("resnet8").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = hf.data.DeviceBatches(
        images, targets, 128, mean=(0.5,) * 3, std=(0.25,) * 3, channels_last=True
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [8], gamma=0.2)
    loss_fn = nn.CrossEntropyLoss()
    samples = {n: batches.sample(n) for n in SIZES}
    probes = {
        (n, tol): hf.curvature.CurvatureProbe(model, loss_fn, samples[n], tol=tol)
        for n in SIZES
        for tol in TOLERANCES
    }
    references = {
        n: hf.curvature.CurvatureProbe(model, loss_fn, samples[n], tol=1e-4, warm_start=False)
        for n in SIZES
    }
    print(source)
    for epoch in range(1, options.epochs + 1):
        for inputs, labels in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_fn(model(inputs), labels)
            loss.backward()
            optimizer.step()
        schedule.step()
        exact = {n: probe() for n, probe in references.items()}
        values = ", ".join(
            f"{n} examples: {r.eigenvalue:.1f} ({r.matvecs})" for n, r in exact.items()
        )
        print(f"epoch {epoch}: {values}")
        for (n, tol), probe in probes.items():
            started = time.process_time()
            reading = probe()
            error = reading.eigenvalue / exact[n].eigenvalue - 1
            seconds = time.process_time() - started
            print(
                f"    {n:3d} examples, tol {tol}: {reading.matvecs} products, {error:+.4f},"
                f" {seconds:.2f} s",
                flush=True,
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=3840)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--data-dir", default=None, help="folder with the CIFAR-10 binary archive")
    return parser.parse_args()


if __name__ == "__main__":
    main()
