"""Read arrays of numbers from MATLAB files of version 5, one variable at a time.

Every variable is an element: a tag (kind and length), then for a matrix the elements flags,
dimensions, name and numbers; usually all of it is packed with zlib. Cells, structures, objects and
text are recognised but not read. Nothing is read beyond the size that is expected.
"""

import math
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from hessianflow.data.files import Source

_MATRIX = 14
_COMPRESSED = 15
_STORED: Mapping[int, str] = {
    **{1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4"},
    **{7: "f4", 9: "f8", 12: "i8", 13: "u8"},
}
"""NumPy's code of numbers by the kind in their tag; names, dimensions, flags are of 1, 5 and 6."""
NUMBERS = frozenset(np.dtype(code).name for code in _STORED.values())
"""Values of :attr:`MatArray.kind` for variables that can be read."""
_CLASSES: Mapping[int, str] = {1: "cell", 2: "struct", 3: "object", 4: "char", 5: "sparse"}
_NUMERIC_CLASSES = range(6, 16)
_COMPLEX = 0x0800
_MAX_VARIABLES = 1000
_MAX_DIMENSIONS = 32
_MAX_NAME = 256
_PIECE = 1 << 20
_BLOCK = 1 << 16


class MatFileError(ValueError):
    """Error for bytes that are no MATLAB file of version 5."""


class Inflated:
    """The unpacked bytes of a zlib stream of `length` packed ones, at which `file` stands.

    They are unpacked in pieces, so that no stream can fill the memory.
    """

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


@dataclass(frozen=True)
class MatArray:
    """One variable, as its header describes it.

    Attributes:
        name: Name of the variable.
        kind: NumPy's name of the type in which its numbers are stored, or "char", "cell", ... if it
            holds none.
        shape: Dimensions of the variable.
        read: Function that returns the numbers in this shape, while the file is at this variable.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[np.generic]]


def mat_arrays(file: BinaryIO) -> Iterator[MatArray]:
    """Yield the variables of a file, in order.

    Raises:
        MatFileError: The file is of another format, or damaged.
        EOFError: The file is cut short.
        zlib.error: The packed content is damaged.
    """
    order = _byte_order(_exactly(file, 128))
    for _ in range(_MAX_VARIABLES):
        tag = file.read(8)
        if not tag:
            return
        if len(tag) < 8:
            raise EOFError("the file is cut short")
        kind, length = struct.unpack(f"{order}II", tag)
        start = file.tell()
        if kind == _COMPRESSED:
            packed = Inflated(file, length)
            kind, _size = struct.unpack(f"{order}II", _exactly(packed, 8))
            yield _matrix(packed, kind, order)
        else:
            yield _matrix(file, kind, order)
        file.seek(start + length)
    raise MatFileError(f"more than {_MAX_VARIABLES} variables")


def _byte_order(header: bytes) -> str:
    order = {b"IM": "<", b"MI": ">"}.get(header[126:128])
    if order is None or struct.unpack(f"{order}H", header[124:126])[0] != 0x0100:
        raise MatFileError("no MATLAB file of version 5")
    return order


def _matrix(stream: Source, kind: int, order: str) -> MatArray:
    if kind != _MATRIX:
        raise MatFileError(f"an element of kind {kind} where a matrix is expected")
    flags = np.frombuffer(_small(stream, order, 8), dtype=f"{order}u4")
    dimensions = np.frombuffer(_small(stream, order, 4 * _MAX_DIMENSIONS), dtype=f"{order}i4")
    name = _small(stream, order, _MAX_NAME).decode("latin-1")
    if len(flags) != 2 or len(dimensions) < 2 or (dimensions < 0).any():
        raise MatFileError(f"the variable {name!r} has no proper flags or dimensions")
    shape = tuple(int(side) for side in dimensions)
    number = int(flags[0]) & 0xFF
    other = _CLASSES.get(number, "unknown")
    if number in _NUMERIC_CLASSES:
        other = "complex" if int(flags[0]) & _COMPLEX else ""
    if other:
        return MatArray(name, other, shape, lambda: _not_numbers(name))
    stored, length, short = _tag(stream, order)
    if stored not in _STORED:
        raise MatFileError(f"the variable {name!r} stores its numbers as kind {stored}")
    dtype = np.dtype(f"{order}{_STORED[stored]}")
    if length != math.prod(shape) * dtype.itemsize:
        raise MatFileError(
            f"the variable {name!r} has {length} bytes for {math.prod(shape)} numbers"
        )

    def read() -> NDArray[np.generic]:
        numbers = np.empty(math.prod(shape), dtype=dtype)
        _fill(numbers.view(np.uint8), stream, short)
        if isinstance(stream, Inflated):
            # Nothing but padding is left, so the end is reached, where the checksum is compared.
            padding = 0 if short else -length % 8
            if len(stream.read(padding + 1)) > padding:
                raise MatFileError(f"the variable {name!r} has more content than numbers")
        return numbers.astype(dtype.newbyteorder("="), copy=False).reshape(shape, order="F")

    return MatArray(name, dtype.newbyteorder("=").name, shape, read)


def _tag(stream: Source, order: str) -> tuple[int, int, bytes]:
    """Return kind and length of an element, and its content if it is short enough for the tag."""
    tag = _exactly(stream, 8)
    kind, length = struct.unpack(f"{order}II", tag)
    if kind >> 16:
        length = kind >> 16
        if length > 4:
            raise MatFileError(f"a short element of {length} bytes")
        return kind & 0xFFFF, length, tag[4 : 4 + length]
    return kind, length, b""


def _small(stream: Source, order: str, most: int) -> bytes:
    """Return the content of an element of at most `most` bytes."""
    _, length, short = _tag(stream, order)
    if short:
        return short
    if length > most:
        raise MatFileError(f"an element of {length} bytes where at most {most} are expected")
    return _exactly(stream, length + -length % 8)[:length]


def _fill(target: NDArray[np.uint8], stream: Source, short: bytes) -> None:
    if short:
        target[:] = np.frombuffer(short, dtype=np.uint8)
        return
    for start in range(0, len(target), _PIECE):
        piece = target[start : start + _PIECE]
        piece[:] = np.frombuffer(_exactly(stream, len(piece)), dtype=np.uint8)


def _not_numbers(name: str) -> NDArray[np.generic]:
    raise MatFileError(f"the variable {name!r} does not hold numbers")


def _exactly(stream: Source, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError("the file is cut short")
    return content
