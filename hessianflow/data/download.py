"""Download and check the official files of a data set.

A download goes to NAME.part and is renamed once its MD5 is right; an interrupted one continues
where it stopped. No file of another content is overwritten, and no link is written through.
Nothing is downloaded unless the user asks for it.
"""

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import md5
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import BinaryIO, Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from hessianflow.data.archives import unpack
from hessianflow.data.datasets import load
from hessianflow.data.files import open_plain
from hessianflow.data.sources import SOURCES, Source, one_line, root_folder
from hessianflow.interfaces import HessianFlowError

Progress = Callable[[str, int, int], None]
"""Function called as progress(file, bytes so far, bytes in all or 0 if unknown)."""

SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")
BLOCK = 1 << 18
TIMEOUT_SECONDS = 30.0
MAX_DOWNLOAD_BYTES = 2 << 30
"""Largest download whose size is not known beforehand; it stops if a server sends more."""


@dataclass(frozen=True)
class FileReport:
    """Result of :func:`verify` for one official file.

    Attributes:
        path: Path of the file, or of the folder it was unpacked to.
        state: "ok", "missing", or "damaged" (another size or MD5).
        detail: Actual and expected size and MD5, in words.
    """

    path: Path
    state: Literal["ok", "missing", "damaged"]
    detail: str


def fetch(
    name: str,
    root: str | Path | None = None,
    *,
    progress: Progress | None = None,
    sources: Mapping[str, Sequence[Source]] = SOURCES,
) -> Path:
    """Download the missing files of a data set, check and unpack them, and return their folder.

    Args:
        name: Name of the data set.
        root: Folder for the files, in which a leading ~ is a home; None for
            :func:`hessianflow.data.sources.default_root`.
        progress: Function called while bytes arrive.
        sources: Addresses of the files; the official ones unless a mirror is wanted.

    Raises:
        HessianFlowError: The name is unknown, the server does not answer, a file has another MD5,
            the disk is full, or something else has the name of a file to download.
    """
    folder = root_folder(root or None)
    for source in _sources(name, sources):
        path = folder / source.file
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not _is_there(source, path):
                _download(source, path, progress)
            if source.unpacks_to and not (folder / source.unpacks_to).is_dir():
                _unpack(path, folder / source.unpacks_to)
        except (OSError, HTTPException) as error:
            raise HessianFlowError(
                f"fetching {source.url} to {path} failed ({one_line(error)}); run the command again"
                " to continue"
            ) from error
    return folder


def verify(
    name: str, root: str | Path | None = None, *, sources: Mapping[str, Sequence[Source]] = SOURCES
) -> list[FileReport]:
    """Compare every official file of a data set under `root` with its published size and MD5.

    Where an archive is gone but its contents are there, both splits are read instead, to check
    sizes, counts and labels. No file is changed.

    Raises:
        HessianFlowError: The name has no published files.
    """
    folder = root_folder(root or None)
    return [_report(name, folder / source.file, source) for source in _sources(name, sources)]


def _sources(name: str, sources: Mapping[str, Sequence[Source]]) -> Sequence[Source]:
    if name == "imagenet":
        raise HessianFlowError(
            "imagenet is given out by its owners after registration at https://image-net.org:"
            " arrange the images as train/CLASS/*.JPEG and val/CLASS/*.JPEG and pass that folder"
        )
    if name not in sources:
        raise HessianFlowError(
            f"no files to get for data set {name!r}; known: {', '.join(sorted(sources))}"
        )
    return sources[name]


def _report(name: str, path: Path, source: Source) -> FileReport:
    if not path.is_file():
        return _report_unpacked(name, path, source)
    difference = _difference(path, source)
    if difference:
        return FileReport(path, "damaged", difference)
    return FileReport(path, "ok", f"{path.stat().st_size} bytes, MD5 {source.md5}")


def _difference(path: Path, source: Source) -> str:
    """Return how size or MD5 of a file differ from the published ones; nothing if they do not."""
    size = path.stat().st_size
    if source.size and size != source.size:
        return f"{size} bytes, expected {source.size}"
    with open_plain(path) as file:
        checksum = _md5_of(file)
    if checksum != source.md5:
        return f"MD5 {checksum} ({size} bytes), expected {source.md5}"
    return ""


def _report_unpacked(name: str, path: Path, source: Source) -> FileReport:
    if not (source.unpacks_to and (path.parent / source.unpacks_to).is_dir()):
        return FileReport(path, "missing", f"get it from {source.url}")
    folder = path.parent / source.unpacks_to
    try:
        counts = [len(load(name, path.parent, split)) for split in SPLITS]
    except HessianFlowError as error:
        return FileReport(folder, "damaged", str(error))
    return FileReport(
        folder, "ok", f"unpacked, {counts[0]} examples for training and {counts[1]} for testing"
    )


def _is_there(source: Source, path: Path) -> bool:
    """Return whether the file needs no download; refuse anything else that has its name."""
    if not os.path.lexists(path):
        return False
    if not path.is_file():
        raise HessianFlowError(
            f"{path}: is in the way of {source.url}, and no file; move it away, or fetch elsewhere"
        )
    difference = _difference(path, source)
    if difference:
        raise HessianFlowError(
            f"{path}: {difference}; not overwritten: move or delete it, then fetch again"
        )
    return True


def _download(source: Source, path: Path, progress: Progress | None) -> None:
    part = path.with_name(f"{path.name}.part")
    with _open_part(part) as file:
        try:
            whole = _size(file) and _size(file) <= _limit(source)
            # A complete download may have been interrupted before it was renamed.
            if not (whole and _md5_of(file) == source.md5):
                _continue_download(source, file, progress)
            checksum = _md5_of(file)
        finally:
            if _size(file) == 0:
                part.unlink(missing_ok=True)
    if checksum != source.md5:
        part.unlink(missing_ok=True)
        raise HessianFlowError(
            f"{source.url}: MD5 is {checksum}, expected {source.md5}; deleted, fetch it again"
        )
    part.replace(path)


def _open_part(part: Path) -> BinaryIO:
    """Open a download in progress, or begin one; refuse a link or the like that leads elsewhere."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        file = os.fdopen(os.open(part, flags | getattr(os, "O_BINARY", 0), 0o666), "r+b")
    except OSError as error:
        if part.is_symlink() or part.is_dir() or part.exists():
            raise HessianFlowError(
                f"{part}: is no file of a download ({one_line(error)}); move it away"
            ) from error
        raise
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise HessianFlowError(
                f"{part}: is no file of a download (a device, or a file of two names); move it away"
            )
        if not _locked(file) or not os.path.samestat(status, os.stat(part)):
            raise HessianFlowError(
                f"{part}: another fetch is at work on it; run the command again when it is done"
            )
    except BaseException:
        file.close()
        raise
    return file


def _locked(file: BinaryIO) -> bool:
    """Lock the file, if the system can lock files; return False if another process holds it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


def _limit(source: Source) -> int:
    return source.size or MAX_DOWNLOAD_BYTES


def _continue_download(source: Source, file: BinaryIO, progress: Progress | None) -> None:
    have = _size(file)
    if have > _limit(source):
        have = 0
    response = _request(source, have)
    if response is None:  # the part is longer than the file: start again
        have = 0
        response = _request(source, have)
    if response is None:
        raise HTTPException("the server has no such range")
    with response:
        if response.status != 206:  # the server sends the whole file
            have = 0
        file.seek(have)
        file.truncate()
        _copy(source, response, file, progress)


def _request(source: Source, have: int) -> HTTPResponse | None:
    """Return the response with all bytes from number `have` on, or None if there are none."""
    try:
        request = Request(source.url)
        if have:
            request.add_header("Range", f"bytes={have}-")
        response: HTTPResponse = urlopen(request, timeout=TIMEOUT_SECONDS)
    except HTTPError as error:
        error.close()
        if error.code != 416:
            raise
        return None
    except (ValueError, LookupError) as error:  # UnicodeError is one of them
        raise HessianFlowError(
            f"{source.url}: it, or where it leads, is no address ({one_line(error)})"
        ) from error
    return response


def _copy(
    source: Source, response: HTTPResponse, file: BinaryIO, progress: Progress | None
) -> None:
    """Write the bytes that arrive, and refuse more than the file can have."""
    have = file.tell()
    limit = _limit(source)
    total = have + _announced(source, response)
    if total > limit:
        raise HessianFlowError(
            f"{source.url}: would send {total} bytes, at most {limit} are expected; stopped"
        )
    while block := response.read(min(BLOCK, limit + 1 - have)):
        have += len(block)
        if have > limit:
            raise HessianFlowError(f"{source.url}: sent more than {limit} bytes; stopped")
        file.write(block)
        if progress is not None:
            progress(source.file, have, total)
    file.flush()
    if have < total:
        raise HTTPException(f"the connection closed after {have} of {total} bytes")


def _announced(source: Source, response: HTTPResponse) -> int:
    """Return the number of bytes that the server announces; 0 if it announces none."""
    length: str = response.headers.get("Content-Length") or "0"
    if not (length.isascii() and length.isdigit() and len(length) < 20):
        raise HessianFlowError(
            f"{source.url}: the server announces {length[:20]!r} bytes, which is no number; stopped"
        )
    return int(length)


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack beside the target, then rename, so that a folder that exists is complete."""
    scratch = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        unpack(archive, scratch)
        if not (scratch / folder.name).is_dir():
            raise HessianFlowError(f"{archive}: holds no folder {folder.name}; get it again")
        (scratch / folder.name).replace(folder)
    finally:
        rmtree(scratch)


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _md5_of(file: BinaryIO) -> str:
    digest = md5(usedforsecurity=False)
    file.seek(0)
    while block := file.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()
