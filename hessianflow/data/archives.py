"""Reading and unpacking archives that are not trusted.

Only plain files and folders come out, only below the target folder, and never more bytes than allowed. Links, devices,
absolute names and names with ".." are refused before anything is written.
"""

import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from gzip import BadGzipFile
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from typing import IO

from hessianflow.data.sources import one_line
from hessianflow.interfaces import HessianFlowError

MAX_UNPACKED_BYTES = 4 << 30
"""Largest total that an archive may unpack to by default (ours; the largest of our sets needs 0.6 GB)."""

DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, BadGzipFile, zlib.error, lzma.LZMAError),
    *(EOFError, RuntimeError, ValueError, FileExistsError),
)
"""What the standard library raises on archives that are broken, encrypted, or of an unknown compression."""

Member = tarfile.TarInfo | zipfile.ZipInfo


def unpack(archive: Path, target: Path, *, max_bytes: int = MAX_UNPACKED_BYTES) -> None:
    """Unpack a tar (of any compression) or zip archive below `target`; nothing is written if any member is unsafe.

    Raises:
        HessianFlowError: a damaged archive, an unsafe member, or more than `max_bytes` in all.
    """
    with _opened(archive) as opened:
        members: list[Member] = []
        total = 0
        for member in opened if isinstance(opened, tarfile.TarFile) else opened.infolist():
            _check_member(archive, member)
            members.append(member)
            total += _size(member)
            if total > max_bytes:
                raise HessianFlowError(f"{archive}: would unpack to more than the {max_bytes} bytes allowed")
        for member in members:
            if not _is_folder(member):
                _write(opened, member, target / _name(member))


def read_members(archive: Path, names: Collection[str], *, max_bytes: int) -> dict[str, bytes]:
    """The contents of those of `names` that a tar archive holds, in one pass, without unpacking.

    Args:
        archive: of any compression.
        names: full member names; only plain files of exactly these names are read.
        max_bytes: largest size a member may have.

    Raises:
        HessianFlowError: a damaged archive, a member that is no plain file, or one larger than `max_bytes`.
    """
    found: dict[str, bytes] = {}
    with _opened(archive) as opened:
        assert isinstance(opened, tarfile.TarFile)
        for member in opened:
            name = member.name.removeprefix("./")
            if name not in names:
                continue
            _check_member(archive, member)
            if member.size > max_bytes:
                raise HessianFlowError(f"{archive}: {name} has {member.size} bytes, expected at most {max_bytes}")
            with _stream(opened, member) as stream:
                found[name] = stream.read()
    return found


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile | zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(archive) if archive.suffix == ".zip" else tarfile.open(archive) as opened:
            yield opened
            if isinstance(opened, tarfile.TarFile):
                _read_to_the_end(opened)
    except DAMAGE as error:
        raise HessianFlowError(f"{archive}: damaged archive ({one_line(error)}); get it again") from error


def _read_to_the_end(opened: tarfile.TarFile) -> None:
    """The checksum of a compressed stream is checked only where it ends."""
    while opened.fileobj is not None and opened.fileobj.read(1 << 20):
        pass


def _name(member: Member) -> str:
    return member.name if isinstance(member, tarfile.TarInfo) else member.filename


def _size(member: Member) -> int:
    return member.size if isinstance(member, tarfile.TarInfo) else member.file_size


def _is_folder(member: Member) -> bool:
    return member.isdir() if isinstance(member, tarfile.TarInfo) else member.is_dir()


def _check_member(archive: Path, member: Member) -> None:
    name = _name(member)
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        raise HessianFlowError(f"{archive}: refused, the member {name!r} would land outside the target folder")
    if not (_is_folder(member) or _is_plain_file(member)):
        raise HessianFlowError(f"{archive}: refused, the member {name!r} is a link or a device, not a plain file")


def _is_plain_file(member: Member) -> bool:
    if isinstance(member, tarfile.TarInfo):
        return member.isreg()
    kind = member.external_attr >> 28  # the file type bits of the Unix mode; 0 where another system packed it
    return kind in (0, 0o10)


def _stream(opened: tarfile.TarFile | zipfile.ZipFile, member: Member) -> IO[bytes]:
    stream = opened.extractfile(member) if isinstance(opened, tarfile.TarFile) else opened.open(member)  # type: ignore[arg-type]
    assert stream is not None  # members that are no plain files were refused
    return stream


def _write(opened: tarfile.TarFile | zipfile.ZipFile, member: Member, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _stream(opened, member) as stream, path.open("wb") as file:
        copyfileobj(stream, file, 1 << 20)
