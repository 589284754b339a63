"""Count the images of a class-folder tree, and tell their usual size, without decoding them."""

import os
import statistics
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from hessianflow.checks import in_home
from hessianflow.data.images import FORMATS, SUFFIXES, pillow, spread_evenly

SAMPLE = 64
"""Files whose headers are read to tell the usual size. This default is our choice."""


def training_images(root: str | Path, most: int) -> list[Path]:
    """Return image files below the class folders of `root`/train, in no order; none without it.

    The search ends at `most` files, since a tree may hold millions.

    Raises:
        HessianFlowError: A home folder is not known.
    """
    return list(islice(_images(in_home(root, "data folder") / "train"), most))


def usual_side(files: Sequence[Path], largest: int) -> int:
    """Return the median of the shorter sides of the images in pixels, at most `largest`.

    Only the headers of a sample are read. Files that are no images, or no plain files, are skipped.

    Raises:
        HessianFlowError: Pillow is not installed.
    """
    reader = pillow()
    sides = []
    for path in (files[index] for index in spread_evenly(SAMPLE, len(files))):
        try:
            if not path.is_file():  # opening a pipe would wait for a writer
                continue
            with reader.open(path, formats=FORMATS) as image:
                sides.append(min(image.size))
        except (OSError, SyntaxError, ValueError, reader.DecompressionBombError):
            continue
    usual: float = statistics.median(sides or [largest])
    return min(largest, round(usual))


def _images(folder: Path) -> Iterator[Path]:
    """Yield the image files in the class folders of one split, by their suffixes."""
    try:
        classes = [entry.path for entry in os.scandir(folder) if entry.is_dir()]
        for label in classes:
            with os.scandir(label) as entries:
                for entry in entries:
                    if Path(entry.name).suffix.lower() in SUFFIXES:
                        yield Path(entry.path)
    except OSError:  # the reader of the data set says what is wrong with the folder
        return
