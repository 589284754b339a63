"""Checkpoints: written atomically, read without executing code, refused when damaged or foreign.

A checkpoint is one dict of tensors, numbers, strings, lists and dicts, so `torch.load(weights_only=True)` reads it.
`last.pt` is always a whole file: it is written beside, synced, and renamed over; the one before it stays as
`previous.pt`, which :func:`load_newest` falls back to when `last.pt` turns out to be damaged on disk.
"""

import os
import random
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hessianflow.interfaces import HessianFlowError

FORMAT, VERSION = "hessianflow-checkpoint", 2
FOLDER, LAST, PREVIOUS, BEST, SET_ASIDE = "checkpoints", "last.pt", "previous.pt", "best.pt", "last.damaged"


def save(path: Path, state: Mapping[str, Any], keep: int = 2) -> None:
    """Write `state` to `path` atomically.

    An existing `last.pt` stays as `previous.pt`, that one as `previous-2.pt`, and so on, `keep` files in all.

    Raises:
        HessianFlowError: the disk is full or the folder cannot be written; the file that was there stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == LAST and path.exists() and keep > 1:
            _keep_previous(path, keep)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        # torch wraps what went wrong on disk in an error of its own.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise HessianFlowError(f"cannot write checkpoint {path}: {_one_line(cause)}; older ones are intact") from None


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        HessianFlowError: the file is absent, damaged, or not a checkpoint of this toolkit.
    """
    if not path.is_file():
        raise HessianFlowError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, unpickling and tensor errors come in many types; each means the same to the user
        raise HessianFlowError(
            f"checkpoint {path} ({path.stat().st_size} bytes) cannot be read: damaged or foreign ({_one_line(error)})"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise HessianFlowError(f"{path} is a file of torch but not a hessianflow checkpoint")
    if state.get("version") != VERSION:
        raise HessianFlowError(f"{path} has checkpoint version {state.get('version')}, this release reads {VERSION}")
    return state


def load_newest(folder: Path, history_bytes: int) -> tuple[dict[str, Any], str | None]:
    """Read `last.pt`, or an older one when that is damaged or later than the history; then it is set aside.

    Args:
        folder: of the checkpoints.
        history_bytes: length of history.jsonl; a checkpoint made when it was longer cannot be continued.

    Returns:
        The state, and a warning when an older file had to be used.

    Raises:
        HessianFlowError: none of the files can be used; what is wrong with the newest.
    """
    first: HessianFlowError | None = None
    older = sorted(folder.glob(f"{Path(PREVIOUS).stem}*.pt"), key=lambda path: (len(path.name), path.name))
    for name in [LAST, *(path.name for path in older)]:
        try:
            state = load(folder / name)
            if state["history_bytes"] > history_bytes:
                raise HessianFlowError(
                    f"{folder / name} was made when the history had {state['history_bytes']} bytes; "
                    f"it has {history_bytes} now: damaged"
                )
        except HessianFlowError as error:
            first = first or error
        else:
            if first is None:
                return state, None
            if (folder / LAST).exists():  # else the next save would move it over the good one
                os.replace(folder / LAST, folder / SET_ASIDE)
            return state, f"{first}; continuing from {name}"
    assert first is not None
    raise first


def generator_states() -> dict[str, Any]:
    """The global random generators as plain data."""
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    inner = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in numpy_state["state"].items()}
    kind, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {**numpy_state, "state": inner},
        "python": [kind, list(words), gauss],
    }


def restore_generators(states: Mapping[str, Any]) -> None:
    """Set the global random generators back to `generator_states()`."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(states["numpy"])
    kind, words, gauss = states["python"]
    random.setstate((kind, tuple(words), gauss))


def plain(value: Any) -> Any:
    """The same structure with NumPy scalars as Python numbers: reading a checkpoint admits no other types."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        items = {plain(key): plain(item) for key, item in value.items()}
        return type(value)(items) if type(value) in (OrderedDict, Counter) else items
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(plain(item) for item in value)
    return value


def all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether every number in them is finite (waits for the device once)."""
    present = [t.detach() for t in tensors if t.is_floating_point() and t.numel()]
    if not present:
        return True
    norms = torch._foreach_norm(present, float("inf"))
    return bool(torch.isfinite(torch.stack([norm.float() for norm in norms])).all())


def load_model(model: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Load weights and buffers.

    Raises:
        HessianFlowError: names or shapes differ; the message names the first that does.
    """
    own = model.state_dict()
    for name in [*own, *state]:
        if name not in state or name not in own:
            where = "the model" if name in own else "the checkpoint"
            raise HessianFlowError(f"{source} is of another model: only {where} has {name!r}")
        if not isinstance(own[name], torch.Tensor) or not isinstance(state[name], torch.Tensor):
            continue  # a module's own extra state: its business
        if own[name].shape != state[name].shape:
            raise HessianFlowError(
                f"{source} is of another model: {name!r} has shape {list(state[name].shape)} there, "
                f"{list(own[name].shape)} here"
            )
    model.load_state_dict(state)


def _keep_previous(path: Path, keep: int) -> None:
    names = [PREVIOUS, *(f"{Path(PREVIOUS).stem}-{number}.pt" for number in range(2, keep))]
    for newer, older in reversed(list(pairwise(names))):
        if path.with_name(newer).exists():
            os.replace(path.with_name(newer), path.with_name(older))
    link = path.with_name(PREVIOUS + ".tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)  # last.pt itself stays until the new one takes its name
    except OSError:  # a file system without hard links: for a moment there is only previous.pt
        link = path
    os.replace(link, path.with_name(PREVIOUS))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
