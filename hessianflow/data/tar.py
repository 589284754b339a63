"""Read the headers and files of a tar archive in order, in bounded memory and time.

Plain files and folders are read in the formats ustar, GNU (long names) and pax (paths and sizes);
everything else is reported as "other", to be refused. The standard library reads more formats, but
a few bytes can make it loop, or read as much as a header asks for.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from hessianflow.data.files import Source

_BLOCK = 512
_PIECE = 1 << 20
MAX_HEADER_BYTES = 1 << 16
"""Largest long name or list of attributes: our choice, eight times what a name and a link need."""
MAX_HEADERS = 1 << 18
"""Most headers of an archive: our choice, twice as many as the largest data set has."""

Kind = Literal["file", "folder", "other"]

_OCTAL = re.compile(rb" *([0-7]*) *")
_KINDS: dict[bytes, Kind] = {b"0": "file", b"\0": "file", b"7": "file", b"5": "folder"}
_WITHOUT_CONTENT = frozenset(b"123456")


class TarReadError(ValueError):
    """Error for bytes that are no tar archive."""


@dataclass(frozen=True)
class Member:
    """One member of an archive, as its headers describe it.

    Attributes:
        name: Name as stored; in a tar, bytes that are no UTF-8 become surrogate escapes.
        size: Size in bytes.
        kind: "file", "folder", or "other" (a link, a device, a sparse file, or unknown).
        blocks: Function that yields the content in pieces, no more than `size` bytes in all, while
            the archive is at this member.
    """

    name: str
    size: int
    kind: Kind
    blocks: Callable[[], Iterator[bytes]]


class TarReader:
    """Iterator over the members; :meth:`blocks` yields the content of the last one yielded.

    Args:
        stream: Archive, after decompression.
        max_bytes: Largest number of bytes to read in all.

    Raises:
        TarReadError: The bytes are no archive, or more than allowed.
        EOFError: The archive is cut short.
    """

    def __init__(self, stream: Source, max_bytes: int) -> None:
        self._stream = stream
        self._budget = max_bytes
        self._left = 0

    def __iter__(self) -> Iterator[Member]:
        overrides: dict[str, str] = {}
        for number in range(MAX_HEADERS):
            header = self._take(_BLOCK, may_end=number > 0)
            if not header.strip(b"\0"):
                self._drain()
                return
            _check_sum(header)
            size = _number(header[124:136])
            flag = header[156:157]
            if flag in b"LKxg":
                self._read_extension(flag, size, overrides)
                continue
            yield from self._member(header, size, overrides)
            overrides = {}
        raise TarReadError(f"more than {MAX_HEADERS} members")

    def blocks(self) -> Iterator[bytes]:
        """Yield the rest of the content of the last member yielded."""
        while self._left:
            block = self._take(min(self._left, _PIECE))
            self._left -= len(block)
            yield block

    def _member(self, header: bytes, size: int, overrides: dict[str, str]) -> Iterator[Member]:
        flag = header[156:157]
        name = overrides.get("path") or _name(header)
        kind = _KINDS.get(flag, "other")
        if flag == b"\0" and name.endswith("/"):  # how the oldest archives store folders
            kind = "folder"
        if "size" in overrides:
            size = _decimal(overrides["size"])
        if "sparse" in overrides:
            kind = "other"
        stored = 0 if header[156] in _WITHOUT_CONTENT else size
        if kind != "file":
            size = 0
        self._left = stored
        yield Member(name, size, kind, self.blocks)
        for _ in self.blocks():
            pass
        self._take(-stored % _BLOCK)

    def _read_extension(self, flag: bytes, size: int, overrides: dict[str, str]) -> None:
        """Read a header that describes the next member: GNU's long names, or pax attributes."""
        if size > MAX_HEADER_BYTES:
            raise TarReadError(f"a header of {size} bytes")
        content = self._take(size)
        self._take(-size % _BLOCK)
        if flag == b"L":
            overrides["path"] = _text(content)
        elif flag == b"x":
            attributes = _attributes(content)
            overrides |= {key: attributes[key] for key in ("path", "size") if key in attributes}
            if any(key.startswith("GNU.sparse") for key in attributes):
                overrides["sparse"] = "yes"

    def _take(self, size: int, *, may_end: bool = False) -> bytes:
        self._budget -= size
        if self._budget < 0:
            raise TarReadError("more bytes than allowed")
        content = self._stream.read(size)
        if len(content) < size and (content or not may_end):
            raise EOFError("the archive is cut short")
        return content

    def _drain(self) -> None:
        """Read beyond the end mark, since a compressed stream has its checksum at its end."""
        while block := self._stream.read(min(_PIECE, self._budget + 1)):
            self._budget -= len(block)
            if self._budget < 0:
                raise TarReadError("more bytes than allowed behind the end")


def _check_sum(header: bytes) -> None:
    plain = header[:148] + b" " * 8 + header[156:]
    # Some old programs summed signed bytes.
    signed = sum(plain) - 256 * sum(byte > 127 for byte in plain)
    if _number(header[148:156]) not in (sum(plain), signed):
        raise TarReadError("a header with a wrong checksum")


def _number(field: bytes) -> int:
    if field[0] == 0x80:  # GNU's form of large numbers
        return int.from_bytes(field[1:], "big")
    match = _OCTAL.fullmatch(field.split(b"\0", 1)[0])
    if match is None:
        raise TarReadError("a number that is not octal")
    return int(match[1] or b"0", 8)


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise TarReadError("a size that is no number")
    return int(text)


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500])
    if prefix and header[257:263] == b"ustar\0":
        return f"{prefix}/{name}"
    return name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _attributes(content: bytes) -> dict[str, str]:
    """Return the pax records "LENGTH KEY=VALUE\\n" as a dict, and check every LENGTH."""
    attributes: dict[str, str] = {}
    while content:
        digits = content[:20].split(b" ", 1)[0]
        length = _decimal(digits.decode("latin-1"))
        record = content[len(digits) + 1 : length]
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        if not (equals and record.endswith(b"\n") and length <= len(content)):
            raise TarReadError("a damaged list of attributes")
        attributes[_text(key)] = value.decode("utf-8", "surrogateescape")
        content = content[length:]
    return attributes
