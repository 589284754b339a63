"""Read files that are not trusted: only plain ones of bounded size, and never wait for a writer."""

import errno
import io
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from hessianflow.interfaces import HessianFlowError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# Without O_NONBLOCK, opening a pipe would wait for a writer.
_NO_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class Source(Protocol):
    """A stream of bytes that are read in order."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, and none only at the end."""


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file for reading; links are followed.

    Raises:
        HessianFlowError: The path is a folder, a pipe, a device or a socket.
        OSError: The file is missing or may not be read.
    """
    # The first check comes before opening, since opening a device can already start it.
    _check_plain(path, os.stat(path))
    raw = _Raw(os.open(path, os.O_RDONLY | _NO_WAITING))
    try:
        _check_plain(path, os.fstat(raw.fileno()))
    except HessianFlowError:
        raw.close()
        raise
    return io.BufferedReader(raw)


def read_plain(path: Path, max_bytes: int) -> bytes:
    """Return the whole content of a plain file.

    Raises:
        HessianFlowError: The path is no plain file, or has more than `max_bytes`.
        OSError: The file is missing or may not be read.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= max_bytes:
            content = file.read(max_bytes + 1)  # it may have grown, or give no true size
            if len(content) <= max_bytes:
                return content
    found = f"larger than {max_bytes} bytes (it has {size})"
    raise HessianFlowError(f"{path}: {found}; replace the file")


class _Raw(io.FileIO):
    """A file that raises where reading would wait, as some files of the kernel do."""

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        size = super().readinto(buffer)
        if size is None:
            raise OSError(errno.EAGAIN, "nothing to be read now")
        return size


def _check_plain(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise HessianFlowError(f"{path}: is {kind}, not a plain file; remove or replace it")
