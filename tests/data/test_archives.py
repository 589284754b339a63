"""Unpacking archives that mean harm: nothing may land outside, nothing may be a link, nothing may
be too large."""

import gzip
import io
import os
import random
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from hessianflow.data.archives import read_members, unpack
from hessianflow.interfaces import HessianFlowError


def tar_with(
    path: Path, name: str, *, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        good = tarfile.TarInfo("good.txt")
        good.size = 2
        tar.addfile(good, io.BytesIO(b"ok"))
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = (
            kind,
            link,
            len(content) if kind == tarfile.REGTYPE else 0,
        )
        tar.addfile(member, io.BytesIO(content))
    return path


def zip_with(path: Path, name: str, *, mode: int = 0o100644, content: bytes = b"x") -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("good.txt", b"ok")
        member = zipfile.ZipInfo(name)
        member.external_attr = mode << 16
        packed.writestr(member, content)
    return path


def test_plain_archives_unpack(tmp_path: Path) -> None:
    for number, archive in enumerate(
        (
            tar_with(tmp_path / "a.tar.gz", "deep/er/file.txt"),
            zip_with(tmp_path / "a.zip", "deep/er/file.txt"),
        )
    ):
        unpack(archive, tmp_path / str(number))
        assert (tmp_path / str(number) / "deep/er/file.txt").read_bytes() == b"x"
        assert (tmp_path / str(number) / "good.txt").read_bytes() == b"ok"


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", "C:evil"])
@pytest.mark.parametrize("make", [tar_with, zip_with])
def test_names_that_lead_outside_are_refused_before_anything_is_written(
    make, name: str, tmp_path: Path
) -> None:
    archive = make(tmp_path / ("a.zip" if make is zip_with else "a.tar.gz"), name)
    with pytest.raises(
        HessianFlowError, match=r"refused, the member .* would land outside the target folder"
    ):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_links_and_devices_in_a_tar_are_refused(kind: bytes, tmp_path: Path) -> None:
    archive = tar_with(tmp_path / "a.tar.gz", "evil", kind=kind, link="/etc/passwd")
    with pytest.raises(HessianFlowError, match="the member 'evil' is a link or a device"):
        unpack(archive, tmp_path / "out")
    with pytest.raises(HessianFlowError, match="the member 'evil' is a link or a device"):
        read_members(archive, {"evil"}, max_bytes=10)
    assert not (tmp_path / "out").exists()


def test_links_in_a_zip_are_refused(tmp_path: Path) -> None:
    archive = zip_with(tmp_path / "a.zip", "evil", mode=0o120777, content=b"/etc/passwd")
    with pytest.raises(HessianFlowError, match="the member 'evil' is a link or a device"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("make", [tar_with, zip_with])
def test_more_bytes_than_allowed_are_refused(make, tmp_path: Path) -> None:
    archive = make(
        tmp_path / ("a.zip" if make is zip_with else "a.tar.gz"), "big", content=b"\0" * 10_000
    )
    with pytest.raises(HessianFlowError, match="would unpack to more than the 5000 bytes allowed"):
        unpack(archive, tmp_path / "out", max_bytes=5000)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "'.' is a file without a name"),
        ("./", "'./' is a file without a name"),
        ("a" * 256, r"'a{40}'\.\.\. has a name of 256 bytes and 1 levels, at most 255 and 64"),
        ("\u00e9" * 128, r"has a name of 256 bytes"),
        ("/".join("a" * 65), r"has a name of 1 bytes and 65 levels"),
        ("good.txt/below", "'good.txt' is a file and a folder"),
    ],
)
@pytest.mark.parametrize("make", [tar_with, zip_with])
def test_names_that_cannot_be_are_refused_before_anything_is_written(
    make, name, message, tmp_path: Path
) -> None:
    archive = make(tmp_path / ("a.zip" if make is zip_with else "a.tar.gz"), name)
    if make is zip_with and name == "./":  # a folder, in a zip
        unpack(archive, tmp_path / "out")
        return
    with pytest.raises(HessianFlowError, match=f"{archive.name}: refused, .*{message}"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_name_is_refused(tmp_path: Path) -> None:
    for archive in (tar_with(tmp_path / "a.tar.gz", ""), zip_with(tmp_path / "a.zip", "")):
        with pytest.raises(HessianFlowError, match="the member '' is a file without a name"):
            unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_not_unpacked_to(tmp_path: Path) -> None:
    """A link in it could lead anywhere."""
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out" / "good.txt").symlink_to(tmp_path / "precious")
    with pytest.raises(HessianFlowError, match=r"out: not empty; unpack .* into a new folder"):
        unpack(tar_with(tmp_path / "a.tar.gz", "file"), tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar"])
def test_a_stream_without_end_is_cut_off(name: str, tmp_path: Path) -> None:
    """40 MB of zeros behind the end mark, which nothing announces."""
    archive = tmp_path / name
    write = gzip.open if name.endswith("gz") else open
    with write(tar_with(archive, "x"), "rb") as file:
        content = file.read() if write is gzip.open else gzip.decompress(file.read())
    with write(archive, "wb") as file:
        file.write(content + bytes(40 << 20))
    unpack(archive, tmp_path / "whole")
    with pytest.raises(
        HessianFlowError, match=r"damaged archive .*more bytes than allowed behind the end"
    ):
        read_members(archive, {"good.txt"}, max_bytes=10, max_total=1000)


def test_a_member_that_unpacks_to_more_than_it_says_is_cut_off(tmp_path: Path) -> None:
    """A zip whose table says 10 bytes where 100 MB of zeros are packed: the memory stays small."""
    archive = zip_with(tmp_path / "a.zip", "bomb", content=b"")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("bomb", bytes(100 << 20))
    content = archive.read_bytes()
    size = (100 << 20).to_bytes(4, "little")
    assert content.count(size) == 2
    archive.write_bytes(content.replace(size, (10).to_bytes(4, "little")))
    tracemalloc.start()
    with pytest.raises(HessianFlowError, match=r"damaged archive .*CRC"):
        unpack(archive, tmp_path / "out")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_that_cannot_be_unpacked_piece_by_piece_are_refused(
    method: int, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as packed:
        packed.writestr("file", b"x" * 1000)
    with pytest.raises(
        HessianFlowError,
        match=f"damaged archive .*packed by method {method}, only 0 and 8 are read",
    ):
        unpack(tmp_path / "a.zip", tmp_path / "out")


@pytest.mark.parametrize("kind", ["bz2", "xz"])
def test_another_compression_is_named(kind: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", f"w:{kind}") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    with pytest.raises(
        HessianFlowError,
        match=r"a.tar.gz: packed with \w+, expected gzip or a plain tar; pack it again",
    ):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out")


def test_a_refusal_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(HessianFlowError) as caught:
        read_members(
            tar_with(tmp_path / "a.tar.gz", "big", content=b"x" * 20), {"big"}, max_bytes=10
        )
    assert str(caught.value) == f"{tmp_path / 'a.tar.gz'}: big has 20 bytes, expected at most 10"


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    archive = tar_with(tmp_path / "a.tar.gz", "file", kind=tarfile.DIRTYPE)
    with pytest.raises(HessianFlowError, match="file is a folder, not a file"):
        read_members(archive, {"file"}, max_bytes=10)


@pytest.mark.parametrize("what", ["folder", "pipe", "device"])
def test_what_is_no_plain_file_is_not_opened(what: str, tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    {
        "folder": archive.mkdir,
        "pipe": lambda: os.mkfifo(archive),
        "device": lambda: archive.symlink_to("/dev/zero"),
    }[what]()
    with pytest.raises(
        HessianFlowError, match=r"a.tar: is a .*, not a plain file; remove or replace it"
    ):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_what_is_no_archive_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no archive at all")
    with pytest.raises(HessianFlowError, match=f"{name}: damaged archive .*; get it again"):
        unpack(tmp_path / name, tmp_path / "out")


def test_broken_compressed_data_is_named(tmp_path: Path) -> None:
    archive = tar_with(
        tmp_path / "a.tar.gz",
        "noise",
        content=bytes(random.Random(0).choices(b"abcdefgh", k=20_000)),
    )
    content = bytearray(archive.read_bytes())
    content[3000:3100] = b"\xff" * 100
    archive.write_bytes(content)
    with pytest.raises(HessianFlowError, match=r"a\.tar\.gz: damaged archive") as caught:
        read_members(archive, {"noise", "absent"}, max_bytes=1 << 20)
    assert "\n" not in str(caught.value)


def test_only_the_named_members_are_read(tmp_path: Path) -> None:
    archive = tar_with(tmp_path / "a.tar.gz", "other")
    assert read_members(archive, {"good.txt", "absent"}, max_bytes=10) == {"good.txt": b"ok"}
