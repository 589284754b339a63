"""Checkpoint files, written atomically, read without executing code, refused when damaged.

A checkpoint is one dict of tensors, numbers, strings, lists and dicts, so
`torch.load(weights_only=True)` reads it. `last.pt` is always a whole file: a new one is written
beside it, synced, and renamed over it. The one before stays as `previous.pt`, to which
:func:`load_newest` falls back if `last.pt` is damaged.
"""

import os
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from hessianflow.interfaces import HessianFlowError
from hessianflow.runs.files import replacing, telling, to_disk
from hessianflow.runs.history import ends_a_row
from hessianflow.runs.names import HISTORY, LAST, PREVIOUS, SET_ASIDE, SETTINGS
from hessianflow.runs.schema import shown

FORMAT = "hessianflow-checkpoint"
VERSION = 2


class UnreadableError(HessianFlowError):
    """A checkpoint does not exist or may not be read; that says nothing about its content."""


def save(path: Path, state: Mapping[str, Any], keep: int = 2) -> None:
    """Write `state` to `path` atomically.

    An existing `last.pt` becomes `previous.pt`, which becomes `previous-2.pt`, and so on; `keep`
    files stay in all.

    Raises:
        HessianFlowError: The disk is full or the folder cannot be written; existing files stay.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            with open(temporary, "wb") as file:
                torch.save({"format": FORMAT, "version": VERSION, **state}, file)
                file.flush()
                os.fsync(file.fileno())  # before the older files are renamed
            if path.name == LAST and path.exists() and keep > 1:
                _keep_previous(path, keep)
        to_disk(path.parent)
    except (OSError, RuntimeError) as error:  # torch wraps a failed write in a RuntimeError
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise HessianFlowError(
            f"cannot write checkpoint {path}: {_one_line(cause)}; older ones are intact"
        ) from None


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        UnreadableError: the file is absent, or may not be read.
        HessianFlowError: the file is damaged, or not a checkpoint of this toolkit.
    """
    if not path.is_file():
        raise UnreadableError(f"no checkpoint at {path}")
    try:
        _check_records(path)
        with warnings.catch_warnings():
            # The warnings of torch about a foreign file do not help the user.
            warnings.simplefilter("ignore")
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UnreadableError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    # Errors of zip files, unpickling and tensors come in many types; each means the same here.
    except Exception as error:
        raise HessianFlowError(
            f"checkpoint {path} ({_size(path)} bytes) cannot be read: damaged or foreign"
            f" ({_one_line(error)})"
        ) from None
    if not isinstance(state, dict) or not _is_same(state.get("format"), FORMAT):
        raise HessianFlowError(f"{path} is a file of torch but not a hessianflow checkpoint")
    if not _is_same(state.get("version"), VERSION):
        raise HessianFlowError(
            f"{path} has checkpoint version {shown(state.get('version'))}, but this release reads"
            f" {VERSION}"
        )
    return state


def _is_same(value: Any, expected: str | int) -> bool:
    return type(value) is type(expected) and bool(value == expected)


def load_checked(path: Path, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Read a checkpoint as :func:`load` does, and let `check` refuse its content."""
    state = load(path)
    try:
        check(state)
    except HessianFlowError as error:
        raise type(error)(f"checkpoint {path}: {error}") from None
    return state


def load_newest(
    folder: Path,
    history_bytes: int,
    check: Callable[[dict[str, Any]], None] = lambda _state: None,
    refused: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[str, Any], str, str | None]:
    """Read `last.pt`, or an older checkpoint if that is damaged or later than the history.

    A caller that continues from an older one must call :func:`set_aside` before the next save.

    Args:
        folder: Folder of the checkpoints.
        history_bytes: Length of history.jsonl; a checkpoint made when it was longer cannot be
            continued.
        check: Function that raises a HessianFlowError if the content of a checkpoint is wrong.
        refused: Reasons, by file name, why files could not be restored.

    Returns:
        The state, the name of its file, and a warning if it is an older file.

    Raises:
        HessianFlowError: None of the files can be used; the message is that of the newest.
    """
    if not any(folder.glob("*.pt")):
        run_dir = folder.parent
        raise UnreadableError(
            f"no checkpoint at {folder / LAST}: the run ended before its first one; begin it again"
            f" with `hessianflow train --config {run_dir / SETTINGS} --run-dir {run_dir}` (from"
            " Python: trainer.fit)"
        )
    first: HessianFlowError | None = None
    for name in _newest_first(folder):
        try:
            if name in refused:
                raise HessianFlowError(refused[name])
            state = load_checked(folder / name, check)
            _check_history(folder, name, state, history_bytes)
        except UnreadableError as error:
            if (folder / name).exists():  # it may be whole, so it is neither skipped nor set aside
                raise
            first = first or error
        except HessianFlowError as error:
            first = first or error
        else:
            if first is None:
                return state, name, None
            return state, name, f"{first}; continuing from {name}"
    assert first is not None
    raise first


def set_aside(folder: Path) -> None:
    """Rename a damaged `last.pt`, which the next save would otherwise move over a good one."""
    with telling("write to", folder):
        if (folder / LAST).exists():
            os.replace(folder / LAST, folder / SET_ASIDE)


def _newest_first(folder: Path) -> list[str]:
    older = sorted(
        folder.glob(f"{Path(PREVIOUS).stem}*.pt"), key=lambda path: (len(path.name), path.name)
    )
    return [LAST, *(path.name for path in older)]


def _check_history(folder: Path, name: str, state: Mapping[str, Any], history_bytes: int) -> None:
    """Refuse a checkpoint whose history became shorter, or was changed, after it was made."""
    made_at = state.get("history_bytes")
    if type(made_at) is not int or made_at < 0:
        raise HessianFlowError(
            f"checkpoint {folder / name}: history_bytes must be a whole number from 0 on"
        )
    if made_at > history_bytes:
        raise HessianFlowError(
            f"{folder / name} was made when the history had {made_at} bytes; it has {history_bytes}"
            " now: damaged"
        )
    history = folder.parent / HISTORY
    if history.is_file() and not ends_a_row(history, made_at):
        raise HessianFlowError(
            f"{history} was changed after {folder / name} was made: byte {made_at} no longer ends"
            " a row"
        )


def _check_records(path: Path) -> None:
    """Compare every record of the archive with its checksum, which torch does not do.

    Raises:
        OSError: the file cannot be read.
        zipfile.BadZipFile: it is not an archive, or a record is damaged.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise zipfile.BadZipFile("its records are compressed, which torch does not do")
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the record {damaged} does not fit its checksum")


def _keep_previous(path: Path, keep: int) -> None:
    """Rename each older checkpoint to the name of the next older one, up to the first free name."""
    names = [path.with_name(PREVIOUS)]
    while names[-1].exists() and len(names) < keep - 1:
        names.append(path.with_name(f"{Path(PREVIOUS).stem}-{len(names) + 1}.pt"))
    for newer, older in zip(names[-2::-1], names[:0:-1], strict=True):
        os.replace(newer, older)
    link = path.with_name(f".{PREVIOUS}.{os.getpid()}.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)  # last.pt itself stays until the new one takes its name
    except OSError:  # a file system without hard links: for a moment there is only previous.pt
        os.replace(path, path.with_name(PREVIOUS))
        return
    os.replace(link, path.with_name(PREVIOUS))
    # After a kill here, previous.pt and last.pt are one file, and renaming one over the other
    # leaves both names.
    link.unlink(missing_ok=True)


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
