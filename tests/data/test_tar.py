"""The reader of tar archives against the standard library's, and headers that make that one loop or
swell."""

import io
import tarfile
import time

import pytest

from hessianflow.data.tar import MAX_HEADER_BYTES, TarReader, TarReadError

BLOCK = 512
NAMES = [
    "short",
    "deep/er/file",
    "a" * 100,
    "b" * 101,
    "p" * 90 + "/" + "q" * 90,
    "\u00fc" * 80,
    "x/" + "y" * 240,
]


def entries(content: bytes, limit: int = 1 << 24) -> list[tuple[str, str, bytes]]:
    reader = TarReader(io.BytesIO(content), limit)
    return [(member.name, member.kind, b"".join(reader.blocks())) for member in reader]


def header(name: str = "file", size: int = 0, flag: bytes = b"0") -> bytearray:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, flag
    return bytearray(info.tobuf(tarfile.USTAR_FORMAT))


def summed(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records: bytes) -> bytes:
    padding = bytes(-len(records) % BLOCK)
    return (
        bytes(header("pax", len(records), b"x")) + records + padding + bytes(header()) + bytes(1024)
    )


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_every_format_are_read_as_the_standard_library_reads_them(form: int) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for number, name in enumerate(NAMES):
            if form == tarfile.USTAR_FORMAT and len(name.encode()) > 100 and "/" not in name:
                continue
            if form == tarfile.USTAR_FORMAT and max(map(len, name.encode().split(b"/"))) > 100:
                continue
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 700 * number, 1.5 if form == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    stream.seek(0)
    with tarfile.open(fileobj=stream) as tar:
        expected = [
            (m.name, "folder", b"") if m.isdir() else (m.name, "file", tar.extractfile(m).read())  # type: ignore
            for m in tar
        ]
    assert [(name.rstrip("/"), *rest) for name, *rest in entries(stream.getvalue())] == expected
    assert len(expected) >= 4


def test_links_devices_and_sparse_files_are_told_apart() -> None:
    for flag in b"12346SX?":
        content = bytes(header("odd", 0, bytes([flag]))) + bytes(1024)
        assert entries(content) == [("odd", "other", b"")]
    sparse = b"22 GNU.sparse.major=1\n"
    assert entries(pax(sparse)) == [("file", "other", b"")]


def test_an_archive_that_ends_without_a_mark_is_read() -> None:
    assert entries(bytes(header("file", 3)) + b"abc" + bytes(509)) == [("file", "file", b"abc")]


def test_large_numbers_of_gnu() -> None:
    block = header("file")
    block[124:136] = b"\x80" + (3).to_bytes(11, "big")
    assert entries(summed(block) + b"abc" + bytes(509 + 1024)) == [("file", "file", b"abc")]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "cut short"),
        (bytes(header())[:100], "cut short"),
        (bytes(header("file", 10)) + b"abc", "cut short"),
        (bytes(header()) + bytes(header("second"))[:300], "cut short"),
        (bytes(header()) + b"?" + bytes(header())[1:] + bytes(1024), "wrong checksum"),
        (summed(header()[:124] + b"-0000000010\0" + header()[136:]), "not octal"),
        (summed(header()[:124] + b"\xff" * 12 + header()[136:]), "not octal"),
        (summed(header()[:124] + b"0000_000010\0" + header()[136:]), "not octal"),
        (bytes(header("x", MAX_HEADER_BYTES + 1, b"x")), "a header of 65537 bytes"),
        (bytes(header("x", 1 << 32, b"L")), "a header of 4294967296 bytes"),
        (pax(b"99 path=x\n"), "damaged list of attributes"),
        (pax(b"2 2 2 2 2 path=x\n"), "damaged list of attributes"),
        (pax(b"10 size=x\n"), "a size that is no number"),
        (pax(b"11 size=-5\n"), "a size that is no number"),
        (pax(b"path=x\n"), "a size that is no number"),
        (pax(b"1" * 60_000), "a size that is no number"),
    ],
)
def test_damaged_headers_are_refused_in_no_time(content: bytes, error: str) -> None:
    """Among them what makes the standard library's reader go back and forth, or search for hours
    (CVE-2024-6232)."""
    began = time.perf_counter()
    with pytest.raises((TarReadError, EOFError), match=error):
        entries(content)
    assert time.perf_counter() - began < 1


def test_no_more_is_read_than_allowed() -> None:
    content = bytes(header("file", 4096)) + bytes(4096 + 1024)
    assert len(entries(content, 6000)) == 1
    with pytest.raises(TarReadError, match="more bytes than allowed"):
        entries(content, 4000)
    with pytest.raises(TarReadError, match="more bytes than allowed behind the end"):
        entries(content + bytes(10_000), 6000)


def test_headers_that_describe_each_other_without_end_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thousand of them, nested, exhaust the standard library's stack."""
    monkeypatch.setattr("hessianflow.data.tar.MAX_HEADERS", 1000)
    chain = (bytes(header("x", 10, b"x")) + b"10 path=x\n" + bytes(502)) * 2000
    with pytest.raises(TarReadError, match="more than 1000 members"):
        entries(chain)
