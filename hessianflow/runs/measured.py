"""Keep measurements made after a run beside earlier ones, and never overwrite those.

A second `hessianflow spectrum` adds its entries to those of the first if both measured the same
function: the same weights, examples and normalisation statistics. Otherwise, and where results
cannot be joined, the earlier file is kept under another name.
"""

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from hessianflow.interfaces import HessianFlowError
from hessianflow.runs.documents import RobustnessFile, SpectrumFile, read_robustness, read_spectrum
from hessianflow.runs.files import write_json
from hessianflow.runs.names import ROBUSTNESS, SPECTRUM

SAME_LOSS = 1e-4
"""Relative difference of losses below which weights and examples count as the same, for any
microbatch size. This default is our choice."""
_FUNCTION = ("size", "num_examples", "norm_mode")
_APART = (*_FUNCTION, "loss", "trace", "density", "layers", "matvecs")
"""Entries of a spectrum besides its eigenvalues and their details."""


def keep_spectrum(folder: Path, measured: Mapping[str, Any]) -> Path | None:
    """Write spectrum.json, together with the further entries of an earlier one.

    None and an empty list stand for what was not measured. If the earlier file was of another
    function, or damaged, it is moved, and its new path is returned.

    Raises:
        HessianFlowError: The path spectrum.json is something other than a file.
        OSError: The file cannot be written.
    """
    earlier = None
    with suppress(HessianFlowError):
        earlier = read_spectrum(folder)
    path = folder / SPECTRUM
    if earlier is not None and _of_one_function(earlier, measured):
        write_json(path, _joined(earlier, measured))
        return None
    moved = moved_aside(path)
    write_json(path, measured)
    return moved


def keep_robustness(folder: Path, measured: Mapping[str, Any]) -> Path | None:
    """Write robustness.json; an earlier one is overwritten only if all of it was measured again.

    Arguments, result and errors are those of :func:`keep_spectrum`.
    """
    earlier = None
    with suppress(HessianFlowError):
        earlier = read_robustness(folder)
    path = folder / ROBUSTNESS
    moved = None
    if earlier is None or not _is_covered(earlier, measured):
        moved = moved_aside(path)
    write_json(path, measured)
    return moved


def _of_one_function(earlier: SpectrumFile, measured: Mapping[str, Any]) -> bool:
    if any(earlier.get(name) != measured.get(name) for name in _FUNCTION):
        return False
    before = earlier.get("loss")
    now = measured.get("loss")
    return before is not None and now is not None and math.isclose(before, now, rel_tol=SAME_LOSS)


def _joined(earlier: SpectrumFile, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of both, the new one where both have it, and the longer eigenvalue list.

    A shorter new list wins only if the longer one did not converge and the new one did.
    """
    joined = cast("dict[str, Any]", {**earlier})
    joined |= {name: value for name, value in measured.items() if value is not None}
    more = len(earlier["eigenvalues"]) > len(measured["eigenvalues"])
    if more and (earlier.get("converged", True) or not measured.get("converged", True)):
        joined = {name: value for name, value in joined.items() if name in _APART}
        joined |= {name: value for name, value in earlier.items() if name not in _APART}
    layers = {
        layer["name"]: layer for layer in (*earlier.get("layers", ()), *measured.get("layers", ()))
    }
    products = earlier.get("matvecs", 0) + measured.get("matvecs", 0)
    return {**joined, "layers": list(layers.values()), "matvecs": products}


def _is_covered(earlier: RobustnessFile, measured: Mapping[str, Any]) -> bool:
    return (
        all(earlier.get(name) == measured.get(name) for name in ("examples", "seed"))
        and set(earlier["accuracy"]) <= set(measured["accuracy"])
        and set(earlier["eps"]) <= set(measured["eps"])
    )


def moved_aside(path: Path) -> Path | None:
    """Give a file the first free name like spectrum-1.json; return None if there is no file."""
    if not path.is_file():
        return None
    number = 1
    while (free := path.with_stem(f"{path.stem}-{number}")).exists():
        number += 1
    os.replace(path, free)
    return free
