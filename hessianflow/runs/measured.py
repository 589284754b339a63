"""Keeps what is measured after a run beside earlier measurements, and never overwrites them.

A second `hessianflow spectrum` adds its parts to those of the first if both measured the same
function: the same weights, examples and normalisation statistics. Otherwise, and where results
cannot be joined, the earlier file is kept under another name.
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
"""Relative difference that losses of the same weights and examples stay below, for any microbatch
size. Ours."""
_FUNCTION = ("size", "num_examples", "norm_mode")
_APART = (*_FUNCTION, "loss", "trace", "density", "layers", "matvecs")
"""What a spectrum holds besides its eigenvalues and their details."""


def keep_spectrum(folder: Path, found: Mapping[str, Any]) -> Path | None:
    """Write spectrum.json, together with what an earlier one holds besides.

    Args:
        folder: an existing folder.
        found: what was measured; None and an empty list stand for what was not.

    Returns:
        The new path of the earlier file, if that was of another function, or damaged.

    Raises:
        HessianFlowError: spectrum.json is something other than a file.
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
    """Write robustness.json; an earlier one is overwritten only if all of it was measured again.

    Args:
        folder: an existing folder.
        found: what was measured.

    Returns:
        The new path of the earlier file, if that holds anything else.

    Raises:
        HessianFlowError: robustness.json is something other than a file.
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
    """Return the parts of both; where both have a part, the new one, but the longer list of
    eigenvalues.

    A shorter new list wins only if the longer one did not converge and the new one did.
    """
    joined = cast("dict[str, Any]", {**earlier})
    joined |= {name: value for name, value in found.items() if value is not None}
    more = len(earlier["eigenvalues"]) > len(found["eigenvalues"])
    if more and (earlier.get("converged", True) or not found.get("converged", True)):
        joined = {name: value for name, value in joined.items() if name in _APART}
        joined |= {name: value for name, value in earlier.items() if name not in _APART}
    layers = {
        layer["name"]: layer for layer in (*earlier.get("layers", ()), *found.get("layers", ()))
    }
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
