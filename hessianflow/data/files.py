"""Reading files that are not trusted: plain ones only, never more bytes than allowed, never waiting
for a writer."""

import errno
import io
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hessianflow.interfaces import HessianFlowError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# a pipe without a writer opens at once
_NO_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file for reading; links are followed.

    Raises:
        HessianFlowError: a folder, a pipe, a device or a socket.
        OSError: a file that is missing or may not be read.
    """
    # before it is opened: opening a device can already set it going
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
        HessianFlowError: no plain file, or one of more than `max_bytes`.
        OSError: a file that is missing or may not be read.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > max_bytes else file.read(max_bytes + 1)
    if max(size, len(content)) > max_bytes:
        raise HessianFlowError(
            f"{path}: larger than {max_bytes} bytes (it has {size}); replace the file"
        )
    return content


class _Raw(io.FileIO):
    """A file that says so where reading would have to wait: some that the kernel makes up are plain
    by name only."""

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """As usual, but never None."""
        size = super().readinto(buffer)
        if size is None:
            raise OSError(errno.EAGAIN, "nothing to be read now")
        return size


def _check_plain(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise HessianFlowError(
            f"{path}: is {_kind(found.st_mode)}, not a plain file; remove or replace it"
        )


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
