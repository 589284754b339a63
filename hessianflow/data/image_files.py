"""A first look at a tree of image files: how many there are, and how large they are."""

import os
import statistics
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from hessianflow.checks import in_home
from hessianflow.data.images import FORMATS, SUFFIXES
from hessianflow.interfaces import HessianFlowError

SAMPLE = 64
"""Files whose headers are read to tell the usual size. Ours."""


def training_images(root: str | Path, most: int) -> list[Path]:
    """Image files below the class folders of `root`/train, at most so many, in no order.

    Args:
        root: folder of the data set; where there is none, no file is found.
        most: files after which the search ends: a tree may hold millions.

    Raises:
        HessianFlowError: a home folder that is not known.
    """
    return list(islice(_images(in_home(root, "data folder") / "train"), most))


def usual_side(files: Sequence[Path], largest: int) -> int:
    """Return the shorter side of most of the images in pixels: the median over a sample, at most
    `largest`.

    Only headers are read. Files that are no images, or no plain files, are passed over.

    Raises:
        HessianFlowError: Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise HessianFlowError(
            "image files need Pillow: pip install 'hessianflow[images]'"
        ) from error
    places = np.unique(np.linspace(0, len(files) - 1, min(SAMPLE, len(files))).round().astype(int))
    sides = []
    for place in places:
        path = files[place]
        try:
            if not path.is_file():  # a pipe would be waited for
                continue
            with Image.open(path, formats=FORMATS) as image:
                sides.append(min(image.size))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue
    return min(largest, round(statistics.median(sides))) if sides else largest


def _images(folder: Path) -> Iterator[Path]:
    """Image files in the class folders of one split, by their suffixes."""
    try:
        classes = [entry.path for entry in os.scandir(folder) if entry.is_dir()]
        for label in classes:
            with os.scandir(label) as entries:
                for entry in entries:
                    if Path(entry.name).suffix.lower() in SUFFIXES:
                        yield Path(entry.path)
    except OSError:  # whoever reads the data says what is wrong with the folder
        return
