"""CIFAR-10 images for the benchmarks: real ones where they are at hand."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

import hessianflow as hf

PACK = Path(__file__).parents[3] / "shared" / "data" / "cifar10.py"
"""A module beside the checkout with `load(split, count)`; optional."""


def cifar10(
    count: int, data_dir: str | None = None, split: str = "train"
) -> tuple[Tensor, Tensor, str]:
    """The first `count` images uint8 [count, 3, 32, 32], their classes int64 [count], and where
    they come from.

    From the official archive in `data_dir`, else from the pack beside the checkout, else made up.
    """
    if data_dir is not None:
        found = hf.data.load("cifar10", data_dir, "train" if split == "train" else "test")
        return found.images[:count], found.targets[:count], "CIFAR-10"
    if PACK.exists():
        spec = importlib.util.spec_from_file_location("cifar10_pack", PACK)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        images, labels = module.load(split, count)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return pixels, torch.from_numpy(labels).long(), "CIFAR-10 (JPEG copy)"
    source = torch.Generator().manual_seed(0)
    made = torch.randint(256, (count, 3, 32, 32), generator=source, dtype=torch.uint8)
    return made, torch.randint(10, (count,), generator=source), "made-up pixels"
