"""Unpack a zlib or gzip stream in pieces, so that no stream can fill the memory."""

import zlib
from collections.abc import Mapping
from typing import BinaryIO, Literal, Protocol

_BLOCK = 1 << 16
_WINDOW_BITS: Mapping[str, int] = {"zlib": 15, "gzip": 31}


class Source(Protocol):
    """A stream of bytes that are read in order."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, and none only at the end."""
        ...


class Inflated:
    """The unpacked bytes of a compressed stream.

    Args:
        file: File, at the start of the stream.
        kind: "zlib" or "gzip"; the latter may be several streams in a row, with zeros after them.
        length: Number of compressed bytes; None for all up to the end of the file.
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
        """Return the next `size` bytes, fewer only at the end, where the checksum is compared.

        Raises:
            EOFError: The stream is cut short.
            zlib.error: The stream is damaged.
        """
        blocks = []
        while size > 0 and (block := self._some(size)):
            blocks.append(block)
            size -= len(block)
        return b"".join(blocks)

    def _some(self, size: int) -> bytes:
        while not self._machine.eof or self._begin_another():
            self._waiting = self._waiting or self._more()
            ended = not self._waiting
            block = self._machine.decompress(self._waiting, size)
            self._waiting = self._machine.unconsumed_tail
            if block:
                return block
            if ended and not self._machine.eof:
                raise EOFError("the compressed data are cut short")
        return b""

    def _begin_another(self) -> bool:
        """Start the gzip stream that follows the one that has ended; return False if none does."""
        rest = self._machine.unused_data
        while self._kind == "gzip" and not rest.strip(b"\0") and (rest := self._more()):
            pass  # padding
        if self._kind != "gzip" or not rest:
            return False
        self._machine = zlib.decompressobj(_WINDOW_BITS[self._kind])
        self._waiting = rest.lstrip(b"\0")
        return True

    def _more(self) -> bytes:
        if self._left is None:
            return self._file.read(_BLOCK)
        block = self._file.read(min(_BLOCK, self._left))
        self._left -= len(block)
        return block
