"""Read and unpack archives that are not trusted.

Only plain files and folders are written, below the target folder, and never more bytes than
allowed. Links, devices, absolute names, names with ".." and impossible names are refused before
anything is written. Tar archives may be packed with gzip; zip members may be stored or deflated.
"""

import gzip
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from hessianflow.data.files import Source, open_plain
from hessianflow.data.sources import one_line
from hessianflow.data.tar import Kind, Member, TarReader
from hessianflow.interfaces import HessianFlowError

MAX_UNPACKED_BYTES = 4 << 30
"""Largest total that an archive may unpack to: our choice, for the largest data set has 0.6 GB."""
MAX_NAME_BYTES = 255  # what file systems take
MAX_DEPTH = 64
"""Most folders inside each other. This default is our choice."""
MAX_MEMBERS = 1 << 18
"""Most members of a zip archive: our choice, twice as many as the largest data set has."""

DAMAGE = (
    *(gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, struct.error, EOFError),
    *(RuntimeError, ValueError, LookupError, OverflowError, MemoryError),
)
"""Errors over archives that are broken, encrypted or packed by an unknown method."""

_PIECE = 1 << 20
_OVERHEAD = 16 << 20  # headers and padding of a tar archive, beside the contents
_LARGEST_READ = 32 << 20  # the table of contents of the largest data set has 14 MB
_END = 1 << 17  # `zipfile` reads to the end to find the last record, which is in the last 64 KB
_FOREIGN = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "zip"}


def unpack(archive: Path, target: Path, *, max_bytes: int = MAX_UNPACKED_BYTES) -> None:
    """Unpack a tar (plain or gzip) or zip archive below `target`, or nothing if a member is unsafe.

    Args:
        archive: Path of the archive; a zip archive has a name that ends in .zip.
        target: Folder that is empty or does not exist, so that nothing in it can lead elsewhere.
        max_bytes: Largest number of bytes of all members together.

    Raises:
        HessianFlowError: A damaged or unsafe archive, more than `max_bytes`, a target in use.
    """
    if target.exists() and any(target.iterdir()):
        raise HessianFlowError(f"{target}: not empty; unpack {archive} into a new folder")
    with _damage_named(archive):
        with _opened(archive, max_bytes) as members:
            _check_members(archive, members, max_bytes)
        with _opened(archive, max_bytes) as members:
            for member in members:
                _check_member(archive, member)  # again: a file may change between two readings
                if member.kind == "file":
                    _write(archive, member, target / member.name)


def read_members(
    archive: Path, names: Collection[str], *, max_bytes: int, max_total: int = MAX_UNPACKED_BYTES
) -> dict[str, bytes]:
    """Return the contents of those of `names` that a tar archive holds, read in one pass.

    Args:
        archive: Tar archive, plain or packed with gzip.
        names: Full member names; only plain files of exactly these names are read.
        max_bytes: Largest size that a member may have.
        max_total: Largest size of the whole archive, unpacked.

    Raises:
        HessianFlowError: A damaged archive, a member that is no plain file, or too many bytes.
    """
    contents: dict[str, bytes] = {}
    with _damage_named(archive), _opened(archive, max_total) as members:
        for member in members:
            name = member.name.removeprefix("./").rstrip("/")
            if name not in names:
                continue
            _check_member(archive, member)
            if member.kind != "file":
                raise HessianFlowError(f"{archive}: {name} is a folder, not a file; get it again")
            if member.size > max_bytes:
                raise HessianFlowError(
                    f"{archive}: {name} has {member.size} bytes, expected at most {max_bytes}"
                )
            contents[name] = b"".join(member.blocks())
    return contents


@contextmanager
def open_zip(archive: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive.

    Raises:
        zipfile.BadZipFile: It is none, or has too large a table of contents or too many members.
    """
    with open_plain(archive) as file, zipfile.ZipFile(_Guarded(file)) as opened:
        if len(opened.infolist()) > MAX_MEMBERS:
            raise zipfile.BadZipFile(f"more than {MAX_MEMBERS} members")
        yield opened


def zip_blocks(opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """Yield the content of one member in pieces, and compare its checksum at the end.

    Raises:
        zipfile.BadZipFile: The member is damaged, or its method cannot be unpacked in pieces.
    """
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(
            f"{info.filename!r} is packed by method {info.compress_type}, only 0 and 8 are read"
        )
    with opened.open(info) as stream:
        left = info.file_size
        while block := stream.read(min(_PIECE, left)):
            left -= len(block)
            yield block
        if left:
            raise EOFError(f"{info.filename!r} lacks {left} bytes")


class _Guarded(io.BufferedIOBase):
    """A file that refuses large reads, since `zipfile` reads as much as an archive tells it to."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LARGEST_READ:
            raise zipfile.BadZipFile(f"a table of contents of {size} bytes")
        if size is None or size < 0:
            size = _END
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_SET and offset < 0:
            raise zipfile.BadZipFile("a place before the beginning")
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


@contextmanager
def _opened(archive: Path, max_bytes: int) -> Iterator[Iterator[Member]]:
    if archive.suffix == ".zip":
        with open_zip(archive) as opened:
            yield (_zip_member(opened, info) for info in opened.infolist())
        return
    with open_plain(archive) as file:
        start = file.read(6)
        file.seek(0)
        for mark, kind in _FOREIGN.items():
            if start.startswith(mark):
                raise HessianFlowError(
                    f"{archive}: packed with {kind}, expected gzip or a plain tar; pack it again"
                )
        stream: Source = file
        if start.startswith(b"\x1f\x8b"):
            stream = gzip.GzipFile(fileobj=file)
        yield iter(TarReader(stream, max_bytes + _OVERHEAD))


def _zip_member(opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    file_type = info.external_attr >> 28  # of the Unix mode; 0 where another system packed it
    kind: Kind = "file" if file_type in (0, 0o10) else "other"
    if info.filename.endswith("/"):
        kind = "folder"
    return Member(info.filename, info.file_size, kind, lambda: zip_blocks(opened, info))


@contextmanager
def _damage_named(archive: Path) -> Iterator[None]:
    try:
        yield
    except HessianFlowError:
        raise
    except DAMAGE as error:
        raise HessianFlowError(
            f"{archive}: damaged archive ({one_line(error)}); get it again"
        ) from error


def _check_members(archive: Path, members: Iterator[Member], max_bytes: int) -> None:
    """Refuse an archive of which any member could not be unpacked."""
    files: set[PurePosixPath] = set()
    folders: set[PurePosixPath] = set()
    total = 0
    for member in members:
        _check_member(archive, member)
        total += member.size
        if total > max_bytes:
            raise HessianFlowError(
                f"{archive}: would unpack to more than the {max_bytes} bytes allowed"
            )
        if member.kind == "file":
            path = PurePosixPath(member.name)
            files.add(path)
            folders.update(path.parents)
    both = files & folders
    if both:
        raise HessianFlowError(
            f"{archive}: refused, {str(min(both))!r} is a file and a folder; get it again"
        )


def _check_member(archive: Path, member: Member) -> None:
    name = member.name
    path = PurePosixPath(name)
    shown = repr(name)
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    fault = ""
    if path.is_absolute() or ".." in path.parts or set(name) & set("\\:\0"):
        fault = "would land outside the target folder"
    elif member.kind == "other":
        fault = "is a link or a device, not a plain file"
    elif member.kind == "file" and not path.parts:
        fault = "is a file without a name"
    elif longest > MAX_NAME_BYTES or len(path.parts) > MAX_DEPTH:
        shown = f"{name[:40]!r}..." if len(name) > 40 else repr(name)
        size = f"{longest} bytes and {len(path.parts)} levels"
        fault = f"has a name of {size}, at most {MAX_NAME_BYTES} and {MAX_DEPTH} are allowed"
    if fault:
        raise HessianFlowError(f"{archive}: refused, the member {shown} {fault}")


def _write(archive: Path, member: Member, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for block in member.blocks():
                file.write(block)
    except OSError as error:
        raise HessianFlowError(
            f"{archive}: {member.name!r} cannot be written ({one_line(error)})"
        ) from error
