"""Street View House Numbers, cropped digits (Netzer et al., 2011), from MATLAB files of version 5.

X is uint8 [32, 32, 3, N], y is [N, 1] with 1 to 10, where 10 stands for the digit 0.
"""

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessianflow.data.files import open_plain
from hessianflow.data.matlab import NUMBERS, MatArray, mat_arrays
from hessianflow.data.sources import SOURCES, damaged, one_line, remedy
from hessianflow.interfaces import HessianFlowError

RECORDS: Mapping[str, int] = {"train": 73_257, "test": 26_032, "extra": 531_131}


def read_svhn(
    root: Path, split: str, *, records: Mapping[str, int] = RECORDS
) -> tuple[Tensor, Tensor]:
    """Return images uint8 [N, 3, 32, 32] and digits int64 [N] of "train", "test" or "extra".

    `root` is the folder that holds the .mat file, or one with a folder svhn in it.

    Raises:
        HessianFlowError: A file is missing, damaged, or has other contents.
    """
    name = "svhn-extra" if split == "extra" else "svhn"
    source = next(s for s in SOURCES[name] if s.file.startswith(split))
    candidates = (folder / source.file for folder in (root, root / "svhn"))
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise HessianFlowError(f"no {source.file} under {root}; {remedy(name)}")
    images, labels = _arrays(name, path, records[split])
    if not np.isin(labels, range(1, 11)).all():
        content = f"{labels.size} labels from {labels.min()} to {labels.max()}"
        raise damaged(name, path, f"y holds {content}, expected {records[split]} from 1 to 10")
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1)))
    return pixels, torch.from_numpy(labels.reshape(-1).astype(np.int64) % 10)


def _arrays(name: str, path: Path, count: int) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Return X and y, each read only if its header says what is expected."""
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with open_plain(path) as file:
            for array in mat_arrays(file):
                if array.name in ("X", "y") and array.name not in arrays:
                    _check_header(name, path, array, count)
                    arrays[array.name] = array.read()
                if len(arrays) == 2:
                    return arrays["X"], arrays["y"]
    except HessianFlowError:
        raise
    except (ValueError, EOFError, OverflowError, MemoryError, zlib.error) as error:
        raise damaged(name, path, f"cannot be read ({one_line(error)})") from error
    missing = min({"X", "y"} - arrays.keys())
    raise damaged(name, path, f"holds no array {missing}")


def _check_header(name: str, path: Path, array: MatArray, count: int) -> None:
    if array.name == "X":
        expected = (32, 32, 3, count)
        if array.shape != expected or array.kind != "uint8":
            raise damaged(name, path, f"X is {array.kind} {array.shape}, expected uint8 {expected}")
        return
    size = math.prod(array.shape)
    if size != count or array.kind not in NUMBERS:
        content = f"{size} labels of type {array.kind}"
        raise damaged(name, path, f"y holds {content}, expected {count} numbers from 1 to 10")
