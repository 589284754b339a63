"""Unpack a zlib stream in pieces, so that no stream can fill the memory."""

import zlib
from typing import BinaryIO, Protocol

_BLOCK = 1 << 16


class Source(Protocol):
    """A stream of bytes that are read in order."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, and none only at the end."""
        ...


class Inflated:
    """The unpacked bytes of a stream of `length` compressed ones, at which `file` stands."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file = file
        self._left = length
        self._machine = zlib.decompressobj()
        self._waiting = b""

    def read(self, size: int, /) -> bytes:
        """Return the next `size` bytes, fewer only at the end, where the checksum is compared.

        Raises:
            EOFError, zlib.error: The stream is cut short, or damaged.
        """
        blocks = []
        while size > 0 and (block := self._some(size)):
            blocks.append(block)
            size -= len(block)
        return b"".join(blocks)

    def _some(self, size: int) -> bytes:
        while not self._machine.eof:
            if not self._waiting:
                self._waiting = self._file.read(min(_BLOCK, self._left))
                self._left -= len(self._waiting)
            ended = not self._waiting
            block = self._machine.decompress(self._waiting, size)
            self._waiting = self._machine.unconsumed_tail
            if block:
                return block
            if ended and not self._machine.eof:
                raise EOFError("the compressed data are cut short")
        return b""
