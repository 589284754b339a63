"""Unpack a zlib or gzip stream piece by piece, so that it cannot fill the memory whatever it
holds."""

import zlib
from collections.abc import Mapping
from typing import BinaryIO, Literal, Protocol

_BLOCK = 1 << 16
_WINDOW_BITS: Mapping[str, int] = {"zlib": 15, "gzip": 31}


class Source(Protocol):
    """Bytes that are read in order."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; none only at the end."""
        ...


class Inflated:
    """The unpacked bytes of a compressed stream.

    Args:
        file: at the start of the stream.
        kind: "gzip" may be several streams one after the other, with zeros behind them.
        length: of the compressed bytes; None: up to the end of the file.
    """

    def __init__(
        self, file: BinaryIO, kind: Literal["zlib", "gzip"], length: int | None = None
    ) -> None:
        self._file = file
        self._kind = kind
        self._left = length
        self._machine = zlib.decompressobj(_WINDOW_BITS[kind])
        self._waiting = b""

    def read(self, size: int, /) -> bytes:
        """Return the next `size` bytes, fewer only at the end; the stream's own checksum is
        compared there.

        Raises:
            EOFError: the stream is cut short.
            zlib.error: it is damaged.
        """
        parts = []
        while size > 0 and (part := self._some(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _some(self, size: int) -> bytes:
        while not self._machine.eof or self._begin_another():
            self._waiting = self._waiting or self._more()
            ended = not self._waiting
            part = self._machine.decompress(self._waiting, size)
            self._waiting = self._machine.unconsumed_tail
            if part:
                return part
            if ended and not self._machine.eof:
                raise EOFError("the compressed data are cut short")
        return b""

    def _begin_another(self) -> bool:
        """Return whether another gzip stream follows the one that has ended."""
        rest = self._machine.unused_data
        while self._kind == "gzip" and not rest.strip(b"\0") and (rest := self._more()):
            pass  # padding
        if self._kind != "gzip" or not rest:
            return False
        self._machine = zlib.decompressobj(_WINDOW_BITS[self._kind])
        self._waiting = rest.lstrip(b"\0")
        return True

    def _more(self) -> bytes:
        block = self._file.read(_BLOCK if self._left is None else min(_BLOCK, self._left))
        if self._left is not None:
            self._left -= len(block)
        return block
