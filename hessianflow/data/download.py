"""Download and check the official files of a data set.

A download goes to NAME.part and is renamed once its MD5 is right; an interrupted one is continued where it stopped.
Archives are unpacked safely (:mod:`hessianflow.data.archives`). Only called by the user: nothing here runs on its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import md5
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from hessianflow.data.archives import unpack
from hessianflow.data.datasets import load
from hessianflow.data.sources import SOURCES, Source, default_root, one_line
from hessianflow.interfaces import HessianFlowError

Progress = Callable[[str, int, int], None]
"""progress(file, bytes so far, bytes in all or 0 if unknown)"""

SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")
BLOCK = 1 << 18
TIMEOUT_SECONDS = 30.0
MAX_DOWNLOAD_BYTES = 2 << 30
"""No file of ours is larger; a server that sends more is cut off."""


@dataclass(frozen=True)
class FileReport:
    """What :func:`verify` found about one official file.

    Attributes:
        path: of the file, or of the folder it was unpacked to.
        state: "ok", "missing", or "damaged" (another size or MD5).
        detail: size and MD5 found and expected, in words.
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
    """Download what is missing of a data set, check it, unpack archives; returns the folder to give to `load`.

    Args:
        name: of the data set.
        root: folder to put the files in; None: :func:`hessianflow.data.sources.default_root`.
        progress: called while bytes arrive.
        sources: where files are; the official places unless a mirror is wanted.

    Raises:
        HessianFlowError: an unknown name, a server that does not answer, a file with another MD5, a full disk.
    """
    folder = Path(root or default_root())
    for source in _sources(name, sources):
        path = folder / source.file
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or _md5(path) != source.md5:
                _download(source, path, progress)
            if source.unpacks_to and not (folder / source.unpacks_to).is_dir():
                _unpack(path, folder / source.unpacks_to)
        except (OSError, HTTPException) as error:
            raise HessianFlowError(
                f"fetching {source.url} to {path} failed ({one_line(error)}); run the command again to continue"
            ) from error
    return folder


def verify(
    name: str, root: str | Path | None = None, *, sources: Mapping[str, Sequence[Source]] = SOURCES
) -> list[FileReport]:
    """Compare every official file of a data set under `root` with its published size and MD5; changes nothing.

    Where an archive is gone but its contents are there, both splits are read instead: sizes, counts and labels.

    Raises:
        HessianFlowError: a name without published files.
    """
    folder = Path(root or default_root())
    return [_report(name, folder / source.file, source) for source in _sources(name, sources)]


def _sources(name: str, sources: Mapping[str, Sequence[Source]]) -> Sequence[Source]:
    if name == "imagenet":
        raise HessianFlowError(
            "imagenet is given out by its owners after registration at https://image-net.org: arrange the images as "
            "train/CLASS/*.JPEG and val/CLASS/*.JPEG and pass that folder"
        )
    if name not in sources:
        raise HessianFlowError(f"no files to get for data set {name!r}; known: {', '.join(sorted(sources))}")
    return sources[name]


def _report(name: str, path: Path, source: Source) -> FileReport:
    if not path.is_file():
        return _report_unpacked(name, path, source)
    size = path.stat().st_size
    if source.size and size != source.size:
        return FileReport(path, "damaged", f"{size} bytes, expected {source.size}")
    found = _md5(path)
    if found != source.md5:
        return FileReport(path, "damaged", f"MD5 {found} ({size} bytes), expected {source.md5}")
    return FileReport(path, "ok", f"{size} bytes, MD5 {found}")


def _report_unpacked(name: str, path: Path, source: Source) -> FileReport:
    if not (source.unpacks_to and (path.parent / source.unpacks_to).is_dir()):
        return FileReport(path, "missing", f"get it from {source.url}")
    folder = path.parent / source.unpacks_to
    try:
        counts = [len(load(name, path.parent, split)) for split in SPLITS]
    except HessianFlowError as error:
        return FileReport(folder, "damaged", str(error))
    return FileReport(folder, "ok", f"unpacked, {counts[0]} examples for training and {counts[1]} for testing")


def _download(source: Source, path: Path, progress: Progress | None) -> None:
    part = path.with_name(f"{path.name}.part")
    have = part.stat().st_size if part.exists() else 0
    if not (have and _md5(part) == source.md5):  # complete, but interrupted before it was renamed
        _continue_download(source, part, have, progress)
    found = _md5(part)
    if found != source.md5:
        part.unlink()
        raise HessianFlowError(f"{source.url}: MD5 is {found}, expected {source.md5}; deleted, fetch it again")
    part.replace(path)


def _continue_download(source: Source, part: Path, have: int, progress: Progress | None) -> None:
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        response = urlopen(Request(source.url, headers=headers), timeout=TIMEOUT_SECONDS)
    except HTTPError as error:
        error.close()
        if error.code != 416:
            raise
        part.unlink()  # the part is longer than the file: start again
        response, have = urlopen(source.url, timeout=TIMEOUT_SECONDS), 0
    with response:
        resumed = response.status == 206
        with part.open("ab" if resumed else "wb") as file:
            _copy(source, response, file.write, have if resumed else 0, progress)


def _copy(
    source: Source, response: HTTPResponse, write: Callable[[bytes], int], have: int, progress: Progress | None
) -> None:
    length = response.headers.get("Content-Length")
    total = have + int(length) if length else 0
    while block := response.read(BLOCK):
        write(block)
        have += len(block)
        if have > MAX_DOWNLOAD_BYTES:
            raise HessianFlowError(f"{source.url}: sent more than {MAX_DOWNLOAD_BYTES} bytes; stopped")
        if progress is not None:
            progress(source.file, have, total)
    if have < total:
        raise HTTPException(f"the connection closed after {have} of {total} bytes")


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack next to the target first: a folder that exists is complete."""

    scratch = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        unpack(archive, scratch)
        if not (scratch / folder.name).is_dir():
            raise HessianFlowError(f"{archive}: holds no folder {folder.name}; get it again")
        (scratch / folder.name).replace(folder)
    finally:
        rmtree(scratch)


def _md5(path: Path) -> str:
    digest = md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
