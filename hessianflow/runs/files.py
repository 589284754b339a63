"""Read JSON that may be damaged, and write files whole.

By the time it is read, a file in a run directory may hold anything: half a line, another program's
data, numbers of a thousand digits. Every reader in this package goes through :func:`parsed`, which
bounds depth and numbers before anything computes with them. Every file that is not appended to is
written through :func:`replacing`.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hessianflow.interfaces import HessianFlowError
from hessianflow.runs.schema import LARGEST, LARGEST_WHOLE, Fault, first_fault

MOST_BYTES = 64 * 2**20
"""Largest JSON file in bytes. This default is our choice: a hundred times a spectral density of
many probes."""
MOST_DEPTH = 50
"""Most levels of nested lists and objects. This default is our choice."""
_DIGITS = len(str(LARGEST_WHOLE))
_BRACKET_OR_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


class NotJSONError(ValueError):
    """Error for a text that is no JSON at all: cut short, or something else."""


def parsed(text: bytes) -> Any:
    """Return the value of a JSON text, in which every number is finite and of sane size.

    Raises:
        NotJSONError: The text is not JSON.
        HessianFlowError: It is nested too deep, or holds a number that no run could have written.
    """
    if _depth(text) > MOST_DEPTH:
        raise HessianFlowError(f"lists or objects are nested deeper than {MOST_DEPTH}")
    try:
        value = json.loads(text.decode("utf-8"), parse_int=_whole)
    except (ValueError, RecursionError):
        raise NotJSONError("it is not JSON") from None
    fault = _number_fault(value)
    if fault is not None:
        raise HessianFlowError(str(fault))
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds; {} if there is no such file.

    Raises:
        HessianFlowError: The file cannot be read, is too large, or holds something else.
    """
    if not path.is_file():
        return {}
    with telling("read", path), open(path, "rb") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise HessianFlowError(
            f"{path} is larger than {MOST_BYTES // 2**20} MiB: the file is damaged"
        )
    try:
        value = parsed(text)
    except NotJSONError:
        raise HessianFlowError(f"{path} is not JSON: the file is damaged") from None
    except HessianFlowError as error:
        raise HessianFlowError(f"{path}: {error}: the file is damaged") from None
    if not isinstance(value, dict):
        raise HessianFlowError(f"{path} must hold a JSON object, found a {type(value).__name__}")
    return value


def _whole(digits: str) -> float:
    """Return an integer, or a float if it has more digits than any that a run writes."""
    return int(digits) if len(digits) <= _DIGITS else float(digits)


def _depth(text: bytes) -> int:
    """Return how deep lists and objects are nested, not counting brackets inside strings."""
    brackets = text.count(b"[") + text.count(b"{")
    if brackets <= MOST_DEPTH:
        return brackets
    depth = deepest = 0
    for match in _BRACKET_OR_TEXT.finditer(text):
        sign = match[0]
        if sign in (b"[", b"{"):
            depth += 1
            deepest = max(deepest, depth)
        elif sign in (b"]", b"}"):
            depth -= 1
    return deepest


def _number_fault(value: Any) -> Fault | None:
    """Return the first number that is not finite or too large to compute with."""
    if isinstance(value, float) and not abs(value) <= LARGEST:
        return Fault("", f"must be a finite number of at most {LARGEST:g}, got {value}")
    if isinstance(value, int) and abs(value) > LARGEST_WHOLE:
        return Fault("", f"must be below 2^63, got {value}")
    return first_fault(value, _number_fault)


@contextmanager
def telling(what: str, path: object) -> Iterator[None]:
    """Raise failures of the file system as errors "cannot `what` `path`" while active."""
    try:
        yield
    except OSError as error:
        raise HessianFlowError(f"cannot {what} {path}: {error.strerror or error}") from None


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a path to write to; at the end, the whole new file replaces `target`, or nothing does.

    Temporary files that a killed process left behind are removed.

    Raises:
        HessianFlowError: `target` is something other than a file (a folder, a device, a pipe).
        OSError: The file cannot be written; nothing is left behind.
    """
    target = Path(os.path.realpath(target))
    refuse_special(target)
    remove_leftovers(target)
    temporary = target.with_name(f".{target.name[:40]}.{os.getpid()}.tmp")
    try:
        yield temporary
        to_disk(temporary)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def refuse_special(path: Path) -> None:
    """Refuse a path that is no regular file, but a folder, a device, a pipe or a socket."""
    with suppress(OSError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise HessianFlowError(f"{path} is not an ordinary file: name another")


def remove_leftovers(target: Path) -> None:
    """Remove temporary files of `target` whose processes have ended."""
    for leftover in target.parent.glob(f".{_literal(target.name[:40])}.*.tmp"):
        number = leftover.name.removesuffix(".tmp").rpartition(".")[2]
        if number.isdecimal() and not _runs(int(number)):
            with suppress(OSError):
                leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, or leave the earlier one."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole; numbers that are not finite become null."""
    write_text(path, json.dumps(finite(dict(value)), indent=2, allow_nan=False, default=str) + "\n")


def write_yaml(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings, without the run directory, as YAML for `hessianflow train --config`."""
    import yaml

    kept = {key: value for key, value in settings.items() if key != "run_dir"}
    write_text(path, yaml.safe_dump(kept, sort_keys=False))


def finite(value: Any) -> Any:
    """Return the same structure with None for floats that JSON, or :func:`parsed`, refuses."""
    if isinstance(value, (np.generic, torch.Tensor)):
        value = value.item()
    if isinstance(value, float) and not (math.isfinite(value) and abs(value) <= LARGEST):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk, since a power cut could leave an empty file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _literal(name: str) -> str:
    """Return a glob pattern that matches only this name."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _runs(process: int) -> bool:
    """Return whether a process other than this one has this number."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True
