"""The run directory itself: which process holds it, and whether a run may begin in it.

A process that writes to a run holds a lock on a file in the directory, from before its first write
to its end, so that two processes can never share a directory. The lock belongs to the process
(POSIX): workers do not inherit it, so none of them holds it after a crash. A lock file that a crash
leaves behind does no harm.
"""

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hessianflow.interfaces import HessianFlowError
from hessianflow.runs.files import read_object, telling
from hessianflow.runs.history import read_records
from hessianflow.runs.names import CHECKPOINTS, CONFIG, HISTORY, LOCK, SETTINGS, SUMMARY
from hessianflow.runs.rows import has_no_step

_OF_A_START = (CONFIG, SETTINGS, HISTORY, CHECKPOINTS, LOCK)
"""Names of everything that a run makes up to its first checkpoint."""


class Claim:
    """A run directory held by this process, until it is released or the process ends in any way.

    Raises:
        HessianFlowError: Another process holds the directory.
        OSError: The lock file cannot be made, as in a directory that does not exist.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        descriptor = _locked(path, folder)
        while not _is_at(path, descriptor):  # removed by the process that held it before
            os.close(descriptor)
            descriptor = _locked(path, folder)
        # The finalizer runs once, at the latest with the end of this object.
        self._finalizer = weakref.finalize(self, _let_go, path, descriptor, os.getpid())

    def release(self) -> None:
        """Release the directory and remove the lock file."""
        self._finalizer()


def _locked(path: Path, folder: Path) -> int:
    """Open a lock file and lock it, if the file system can lock files."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise HessianFlowError(
            f"another process is writing to the run {folder}: wait for it, or stop it"
        ) from None
    except (ImportError, OSError):  # Windows; some network file systems have no locks
        pass
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _let_go(path: Path, descriptor: int, owner: int) -> None:
    if os.getpid() != owner:  # a process that was forked
        return
    with suppress(OSError):
        if _is_at(path, descriptor):
            path.unlink()
    with suppress(OSError):
        os.close(descriptor)


def begin_in(folder: Path) -> Claim:
    """Make a directory for a new run, or take one whose run made no step, and hold it.

    Raises:
        HessianFlowError: The directory holds a run or anything else, or another process holds it.
        OSError: The directory cannot be made or written.
    """
    refuse_used(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    claim = None
    try:
        claim = _made_and_held(folder)
        refuse_used(folder)  # another process may have been here in between
        clean(folder)
        return claim
    except BaseException:
        if claim is not None:
            claim.release()
        remove_empty(made)
        raise


def _made_and_held(folder: Path) -> Claim:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return Claim(folder)
        except FileNotFoundError:  # another process made it, and removed it when it was refused
            continue


@contextmanager
def new_folder(base: Path) -> Iterator[Path]:
    """Yield a new directory called `base`, or `base`-2 and so on; at the end, remove it if empty.

    No other process can get the same one.
    """
    made = [path for path in base.parents if not path.exists()]
    path = base
    number = 1
    try:
        while not _made_alone(path):
            number += 1
            path = base.with_name(f"{base.name}-{number}")
        made.insert(0, path)
        yield path
    finally:
        remove_empty(made)


def _made_alone(path: Path) -> bool:
    """Make a directory and return True; return False if its name is taken."""
    with telling("write run directory", path):
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.mkdir()
                return True
            except FileExistsError:
                return False
            except FileNotFoundError:  # another process has just removed the parent folder
                continue


def remove_empty(folders: list[Path]) -> None:
    """Remove those of these directories that are empty, from the innermost on."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def clean(folder: Path) -> None:
    """Remove half-written files of a killed process; only the holder of the directory may do so."""
    for parent in (folder, folder / CHECKPOINTS):
        for path in parent.glob("*.tmp"):
            if _of_what(path.name) != path.name:
                with suppress(OSError):
                    path.unlink(missing_ok=True)


def _of_what(name: str) -> str:
    """Return the name that a temporary file was to get, and other names unchanged.

    Temporary files are called .NAME.PROCESS.tmp; those of earlier releases NAME.tmp.
    """
    if not name.endswith(".tmp"):
        return name
    inner = name.removesuffix(".tmp")
    if inner.startswith("."):
        inner = inner[1:].rpartition(".")[0]
    known = inner in (CONFIG, HISTORY, SUMMARY, SETTINGS) or inner.endswith(".pt")
    return inner if known else name


def refuse_used(folder: Path) -> None:
    """Refuse a folder that holds a run, or anything else, before a new run begins in it.

    A run that ended before its first step leaves nothing to keep and nothing to continue from, so
    another may begin in its place.
    """
    if not folder.is_dir() or not {path.name for path in folder.iterdir()} - {LOCK}:
        return
    if _never_stepped(folder):
        return
    if not (folder / HISTORY).exists():
        raise HessianFlowError(f"run directory {folder} is not empty: name a new or an empty one")
    if any((folder / CHECKPOINTS).glob("*.pt")):
        remedy = (
            f"continue that one with `hessianflow resume {folder}` (from Python: trainer.resume)"
        )
    else:
        remedy = "delete that one, which has no checkpoint to continue from"
    raise HessianFlowError(f"run directory {folder} already holds a run: name another, or {remedy}")


def _never_stepped(folder: Path) -> bool:
    """Return whether a run began here and ended before its first step.

    Such a run has no checkpoint, and no row made after an update.
    """
    names = {_of_what(path.name) for path in folder.iterdir()}
    if not names <= set(_OF_A_START) or any((folder / CHECKPOINTS).glob("*.pt")):
        return False
    # A run begins with its lock file and a temporary file for config.json: either is a sign of one.
    whole = {path.name for path in folder.iterdir()}
    begun = (
        LOCK in whole
        or not whole & {CONFIG, SETTINGS, HISTORY, CHECKPOINTS}
        or _is_ours(folder / CONFIG)
    )
    return begun and _is_ours(folder / CONFIG, absent=True) and _has_no_step(folder / HISTORY)


def _is_ours(config: Path, *, absent: bool = False) -> bool:
    """Return whether a run wrote this config.json, and `absent` if it is missing or empty."""
    if not config.exists():
        return absent
    if config.is_file() and config.stat().st_size == 0:
        return absent
    try:
        packages = read_object(config).get("environment", {}).get("packages", {})
    except (HessianFlowError, AttributeError):
        return False
    return isinstance(packages, dict) and "hessianflow" in packages


def _has_no_step(history: Path) -> bool:
    if not history.is_file():
        return not history.exists()
    try:
        return has_no_step(read_records(history))
    except HessianFlowError:
        return False


def history_length(run_dir: Path) -> int:
    """Return the size in bytes of a run directory's history.jsonl; 0 if there is none."""
    path = run_dir / HISTORY
    if not path.is_file():
        return 0
    return path.stat().st_size
