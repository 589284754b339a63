"""What is measured of a run after the fact goes beside what was measured before, and never over it.

A second `hessianflow spectrum` adds its parts to those of the first where both are of the same function: the same
weights, examples and statistics of normalisation. Otherwise, and where results cannot be joined, the earlier file is
kept under another name.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from hessianflow.interfaces import HessianFlowError
from hessianflow.runs.documents import RobustnessFile, SpectrumFile, read_robustness, read_spectrum
from hessianflow.runs.files import write_json
from hessianflow.runs.names import ROBUSTNESS, SPECTRUM

SAME_LOSS = 1e-4
"""Losses of the same weights and examples differ by less, relative to one of them, whatever the microbatch. Ours."""
_FUNCTION = ("size", "num_examples", "norm_mode")
_APART = (*_FUNCTION, "loss", "trace", "density", "layers", "matvecs")
"""What a spectrum holds beside its eigenvalues and what belongs to them."""


def keep_spectrum(folder: Path, found: Mapping[str, Any]) -> Path | None:
    """Write spectrum.json, with what an earlier one holds besides.

    Args:
        folder: exists.
        found: what was measured; None and an empty list stand for what was not.

    Returns:
        Where the earlier file is now, if it was of another function, or damaged.

    Raises:
        HessianFlowError: something other than a file stands there.
        OSError: it cannot be written.
    """
    try:
        earlier = read_spectrum(folder)
    except HessianFlowError:
        earlier = None
    path = folder / SPECTRUM
    if earlier is not None and _of_one_function(earlier, found):
        write_json(path, _joined(earlier, found))
        return None
    moved = _moved_aside(path)
    write_json(path, found)
    return moved


def keep_robustness(folder: Path, found: Mapping[str, Any]) -> Path | None:
    """Write robustness.json; an earlier one goes only if all of it was measured again.

    Args:
        folder: exists.
        found: what was measured.

    Returns:
        Where the earlier file is now, if it holds anything else.

    Raises:
        HessianFlowError: something other than a file stands there.
        OSError: it cannot be written.
    """
    try:
        earlier = read_robustness(folder)
    except HessianFlowError:
        earlier = None
    path = folder / ROBUSTNESS
    moved = None if earlier is not None and _is_covered(earlier, found) else _moved_aside(path)
    write_json(path, found)
    return moved


def _of_one_function(earlier: SpectrumFile, found: Mapping[str, Any]) -> bool:
    if any(earlier.get(name) != found.get(name) for name in _FUNCTION):
        return False
    before, now = earlier.get("loss"), found.get("loss")
    return before is not None and now is not None and math.isclose(before, now, rel_tol=SAME_LOSS)


def _joined(earlier: SpectrumFile, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return all parts of both; of a part that both have, the new one, and of eigenvalues the more."""
    joined = cast("dict[str, Any]", {**earlier})
    joined |= {name: value for name, value in found.items() if value is not None}
    more = len(earlier["eigenvalues"]) > len(found["eigenvalues"])
    if more and (earlier.get("converged", True) or not found.get("converged", True)):
        joined = {name: value for name, value in joined.items() if name in _APART}
        joined |= {name: value for name, value in earlier.items() if name not in _APART}
    layers = {layer["name"]: layer for layer in (*earlier.get("layers", ()), *found.get("layers", ()))}
    products = earlier.get("matvecs", 0) + found.get("matvecs", 0)
    return {**joined, "layers": list(layers.values()), "matvecs": products}


def _is_covered(earlier: RobustnessFile, found: Mapping[str, Any]) -> bool:
    same = all(earlier.get(name) == found.get(name) for name in ("examples", "seed"))
    attacks, sizes = set(earlier["accuracy"]), set(earlier["eps"])
    return same and attacks <= set(found["accuracy"]) and sizes <= set(found["eps"])


def _moved_aside(path: Path) -> Path | None:
    """Give a file the first free name like spectrum-1.json; None where there is no file."""
    if not path.is_file():
        return None
    number = 1
    while (free := path.with_stem(f"{path.stem}-{number}")).exists():
        number += 1
    os.replace(path, free)
    return free
