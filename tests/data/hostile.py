"""Damaged and hostile files, a folder each: what a search for faults tries, made from a seed."""

import io
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from layouts import (
    SMALL,
    jpeg,
    pack_tar,
    pack_zip,
    pixels,
    python2_cifar,
    write_cifar_binary,
    write_svhn,
    write_tiny_imagenet,
)
from PIL import Image

NAMES = [
    *(
        "",
        ".",
        "./",
        "..",
        "../evil",
        "/evil",
        "//evil",
        "a/../../evil",
        "a\\..\\evil",
        "C:evil",
        "a/./b",
        "a//b",
    ),
    *(
        "\0",
        "a\0b",
        "a" * 256,
        "/".join("a" * 200),
        "\u202eevil",
        "\n",
        "-rf",
        "~",
        "$HOME",
        "CON",
        "nul.",
        " ",
    ),
]
KINDS = [
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
    tarfile.DIRTYPE,
]
KINDS += [tarfile.GNUTYPE_SPARSE, b"?", b"V", b"M"]


def damaged(content: bytes, rng: np.random.Generator, number: int) -> bytes:
    """A file of which bytes are changed, cut off, doubled, zeroed or put elsewhere, one way after
    the other."""
    if not content:
        return b"?"
    start, stop = sorted(int(place) for place in rng.integers(0, len(content) + 1, 2))
    changed = bytearray(content)
    for place in rng.integers(
        0, min(len(content), 600 if number % 2 else len(content)), 1 + number % 7
    ):
        changed[place] ^= 1 << int(rng.integers(0, 8))
    ways: list[bytes | bytearray] = [
        changed,
        content[:stop],
        content[:start] + content[stop:],
        content[:stop] + content[start:],
        content[:start] + bytes(stop - start) + content[stop:],
        content[:start] + rng.bytes(min(stop - start, 64)) + content[stop:],
    ]
    return bytes(ways[number % len(ways)])


def tar_of(
    name: str, *, kind: bytes = tarfile.REGTYPE, size: int | None = None, content: bytes = b"x"
) -> bytes:
    """A tar with one member, whose header may lie about its size."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "../../evil"
        member.size = len(content) if size is None else size
        tar.addfile(
            member, io.BytesIO(content) if size is None and kind == tarfile.REGTYPE else None
        )
    return stream.getvalue()


def gzipped(content: bytes) -> bytes:
    machine = zlib.compressobj(1, zlib.DEFLATED, 31)
    return machine.compress(content) + machine.flush()


def tars(folder: Path, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Archives in the place of CIFAR's."""
    layout = SMALL["cifar10"]
    good = pack_tar(
        write_cifar_binary(layout, folder / "good"), folder / "good.tar.gz"
    ).read_bytes()
    plain = zlib.decompress(good, 31)
    for number in range(24):
        yield f"packed {number}", damaged(good, rng, number)
        yield f"plain {number}", gzipped(damaged(plain, rng, number))
    inside = f"{layout.binary_folder}/test_batch.bin"
    for number, kind in enumerate(KINDS):
        yield f"kind {number}", gzipped(tar_of(inside, kind=kind))
    for number, size in enumerate([1, 30_730, 30_731, 1 << 30, (1 << 33) - 1, 1 << 60]):
        yield f"size {number}", gzipped(tar_of(inside, size=size))
    yield "zeros", gzipped(plain + bytes(64 << 20))
    yield "zeros only", gzipped(bytes(64 << 20))
    yield "a header of 1 GB", gzipped(tar_of("x", kind=b"x", size=1 << 30) + bytes(1 << 20))
    yield (
        "a chain of headers",
        gzipped((tar_of("x", kind=b"x", size=10)[:512] + b"10 path=x\n" + bytes(502)) * 5000),
    )
    yield "digits", gzipped(tar_of("x", kind=b"x", size=60_000)[:512] + b"1" * 60_416)


def pickles(_: Path, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Pickles in the place of CIFAR's, with the right checksums."""
    good = python2_cifar(pixels(2), [0, 1], "labels")
    for number in range(24):
        yield f"damaged {number}", damaged(good, rng, number)
    opcodes = bytes(
        pickle.__dict__[name][0] for name in dir(pickle) if name.isupper() and _is_opcode(name)
    )
    for number in range(24):
        noise = bytes(rng.choice(list(opcodes), 40)) if number % 2 else rng.bytes(200)
        yield f"random {number}", b"\x80\x02" + noise + b"."
    for number, dtype in enumerate(["O", "V8", "S8", "f8", [("a", "O")], "M8[s]", "u1"]):
        yield (
            f"dtype {number}",
            pickle.dumps({"data": np.zeros((2, 3072), dtype), "labels": [0, 1]}, protocol=2),
        )
    for protocol in range(6):
        yield (
            f"protocol {protocol}",
            pickle.dumps({"data": pixels(2).reshape(2, -1), "labels": [0, 1]}, protocol),
        )
    yield "memo", b"\x80\x02}r\xff\xff\xff\x7f."
    yield "deep", b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    yield "claims 2 GB", b"\x80\x02}U\x04dataT\xff\xff\xff\x7f."


def _is_opcode(name: str) -> bool:
    return isinstance(pickle.__dict__[name], bytes) and len(pickle.__dict__[name]) == 1


def mats(folder: Path, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Files in the place of SVHN's."""
    write_svhn(folder / "good.mat")
    good = (folder / "good.mat").read_bytes()
    for number in range(24):
        yield f"damaged {number}", damaged(good, rng, number)
    first = 128 + 8 + struct.unpack("<I", good[132:136])[0]
    for number in range(24):
        inside = damaged(zlib.decompress(good[136:first]), rng, number)
        packed = zlib.compress(inside, 1)
        yield (
            f"inside {number}",
            good[:128] + struct.pack("<II", 15, len(packed)) + packed + good[first:],
        )
    zeros = zlib.compress(zlib.decompress(good[136:first])[:56] + bytes(200 << 20), 9)
    yield "zeros", good[:128] + struct.pack("<II", 15, len(zeros)) + zeros


def zips(folder: Path, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Archives in the place of Tiny-ImageNet's."""
    good = pack_zip(write_tiny_imagenet(folder / "good"), folder / "good.zip").read_bytes()
    for number in range(30):
        yield f"damaged {number}", damaged(good, rng, number)
    for number in range(12):
        table = good.index(b"PK\x01\x02")
        yield f"table {number}", good[:table] + damaged(good[table:], rng, number)
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", method) as packed:
            packed.writestr("tiny-imagenet-200/wnids.txt", bytes(64 << 20))
        yield f"zeros by {method}", stream.getvalue()
        size = (64 << 20).to_bytes(4, "little")
        yield (
            f"hidden zeros by {method}",
            stream.getvalue().replace(size, (100).to_bytes(4, "little")),
        )


def unpacked(folder: Path, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Archives that are unpacked as a whole; those named .zip are zip archives."""
    for number, name in enumerate(NAMES):
        for kind in (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE):
            yield f"name {number} {ord(kind)}", gzipped(tar_of(name, kind=kind, content=b"evil"))
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as packed:
            packed.writestr("x", b"good")
            packed.writestr(zipfile.ZipInfo("placeholder"), b"evil")
        content = stream.getvalue()
        raw = name.encode()[:11].ljust(11, b"/") if len(name) < 11 else b"placeholder"
        yield f"name {number}.zip", content.replace(b"placeholder", raw)
    good = tar_of("a", content=rng.bytes(3000))[:4096] + tar_of("b/c", content=b"y")
    for number in range(12):
        yield f"damaged {number}", gzipped(damaged(good, rng, number))
    archive = pack_zip(write_tiny_imagenet(folder / "good"), folder / "good.zip").read_bytes()
    for number in range(24):
        yield f"damaged {number}.zip", damaged(archive, rng, number)


def pictures(_: Path, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Files under the names of images."""
    image = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    for form in ("JPEG", "PNG", "BMP", "WEBP", "PPM"):
        stream = io.BytesIO()
        image.save(stream, form)
        for number in range(12):
            yield f"{form} {number}", damaged(stream.getvalue(), rng, number)
    for form in ("GIF", "TIFF", "ICO", "PDF", "JPEG2000", "TGA", "EPS", "PCX", "SGI", "IM", "MSP"):
        stream = io.BytesIO()
        (image.convert("1") if form == "MSP" else image).save(stream, form)
        yield form, stream.getvalue()
    yield "a header alone", b"P6 100000 100000 255\n"
    yield "a wide header", b"P6 60000000 1 255\n"
    yield "a header of letters", b"P6 " + b"9" * 10_000 + b" 1 255\n"
    for side in (8_192, 8_193, 30_000):
        yield f"{side} x {side} pixels", black(side)
    yield "nothing", b""


def black(side: int) -> bytes:
    """A black square as PNG, of one bit a pixel, made row by row."""
    machine, row = zlib.compressobj(9), bytes(1 + -(-side // 8))
    rows = b"".join(machine.compress(row) for _ in range(side)) + machine.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def entries(_: Path, rng: np.random.Generator) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """What else can stand in the place of an image; given the path, it is made there."""
    yield "pipe", os.mkfifo
    yield "zeros without end", lambda path: path.symlink_to("/dev/zero")
    yield "a terminal", lambda path: path.symlink_to("/dev/tty")
    yield "memory", lambda path: path.symlink_to("/proc/self/mem")
    yield "kernel messages", lambda path: path.symlink_to("/proc/kmsg")
    yield "a link to itself", lambda path: path.symlink_to(path)
    yield "a dangling link", lambda path: path.symlink_to("nowhere")
    yield "a folder", lambda path: path.mkdir()
    yield "a link to a folder", lambda path: path.symlink_to("..")
    yield "100 GB", lambda path: (path.touch(), os.truncate(path, 100 << 30))
    yield (
        "a link to a pipe",
        lambda path: (os.mkfifo(path.parent / "pipe"), path.symlink_to("pipe")),
    )
    yield "words", lambda path: path.write_bytes(rng.bytes(100))
    yield "a good one", lambda path: path.write_bytes(jpeg((1, 2, 3)))


FAMILIES: dict[str, Callable[[Path, np.random.Generator], Iterator[tuple[str, object]]]] = {
    "tars": tars,
    "pickles": pickles,
    "mats": mats,
    "zips": zips,
    "unpacked": unpacked,
    "pictures": pictures,
    "entries": entries,
}
