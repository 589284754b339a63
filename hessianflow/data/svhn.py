"""Street View House Numbers, cropped digits (Netzer et al., 2011): MATLAB files, read by SciPy.

X is uint8 [32, 32, 3, N], y is [N, 1] with 1 to 10, where 10 stands for the digit 0.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hessianflow.data.sources import SOURCES, damaged, one_line, remedy
from hessianflow.interfaces import HessianFlowError

RECORDS: Mapping[str, int] = {"train": 73_257, "test": 26_032, "extra": 531_131}


def read_svhn(root: Path, split: str, *, records: Mapping[str, int] = RECORDS) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, 32, 32] and digits int64 [N] of "train", "test" or "extra".

    `root` is the folder that holds the .mat file, or one with a folder svhn in it.

    Raises:
        HessianFlowError: a file that is missing, damaged, or has other contents.
    """
    name = "svhn-extra" if split == "extra" else "svhn"
    source = next(s for s in SOURCES[name] if s.file.startswith(split))
    paths = [place / source.file for place in (root, root / "svhn") if (place / source.file).is_file()]
    if not paths:
        raise HessianFlowError(f"no {source.file} under {root}; {remedy(name)}")
    images, labels = _arrays(name, paths[0])
    expected = (32, 32, 3, records[split])
    if images.shape != expected or images.dtype != np.uint8:
        raise damaged(name, paths[0], f"X is {images.dtype} {images.shape}, expected uint8 {expected}")
    if labels.size != records[split] or labels.dtype.kind not in "uif" or not np.isin(labels, range(1, 11)).all():
        if labels.size == 0 or labels.dtype.kind not in "uif":
            raise damaged(name, paths[0], f"y holds {labels.size} labels of type {labels.dtype}")
        found = f"{labels.size} labels from {labels.min()} to {labels.max()}"
        raise damaged(name, paths[0], f"y holds {found}, expected {records[split]} from 1 to 10")
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1)))
    return pixels, torch.from_numpy(labels.reshape(-1).astype(np.int64) % 10)


def _arrays(name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    from scipy.io import loadmat

    try:
        contents = loadmat(path, variable_names=["X", "y"])
        return contents["X"], contents["y"]
    # SciPy answers damaged files with many kinds of error: whichever it is, the file cannot be read.
    except Exception as error:
        raise damaged(name, path, f"cannot be read ({one_line(error)})") from error
