"""Unpacking archives that mean harm: nothing may land outside, nothing may be a link, nothing may be too large."""

import io
import random
import tarfile
import zipfile
from pathlib import Path

import pytest

from hessianflow.data.archives import read_members, unpack
from hessianflow.interfaces import HessianFlowError


def tar_with(path: Path, name: str, *, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        good = tarfile.TarInfo("good.txt")
        good.size = 2
        tar.addfile(good, io.BytesIO(b"ok"))
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, link, len(content) if kind == tarfile.REGTYPE else 0
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
        (tar_with(tmp_path / "a.tar.gz", "deep/er/file.txt"), zip_with(tmp_path / "a.zip", "deep/er/file.txt"))
    ):
        unpack(archive, tmp_path / str(number))
        assert (tmp_path / str(number) / "deep/er/file.txt").read_bytes() == b"x"
        assert (tmp_path / str(number) / "good.txt").read_bytes() == b"ok"


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", "C:evil"])
@pytest.mark.parametrize("make", [tar_with, zip_with])
def test_names_that_lead_outside_are_refused_before_anything_is_written(make, name: str, tmp_path: Path) -> None:
    archive = make(tmp_path / ("a.zip" if make is zip_with else "a.tar.gz"), name)
    with pytest.raises(HessianFlowError, match=r"refused, the member .* would land outside the target folder"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
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
    archive = make(tmp_path / ("a.zip" if make is zip_with else "a.tar.gz"), "big", content=b"\0" * 10_000)
    with pytest.raises(HessianFlowError, match="would unpack to more than the 5000 bytes allowed"):
        unpack(archive, tmp_path / "out", max_bytes=5000)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_what_is_no_archive_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no archive at all")
    with pytest.raises(HessianFlowError, match=f"{name}: damaged archive .*; get it again"):
        unpack(tmp_path / name, tmp_path / "out")


def test_broken_compressed_data_is_named(tmp_path: Path) -> None:
    archive = tar_with(tmp_path / "a.tar.gz", "noise", content=bytes(random.Random(0).choices(b"abcdefgh", k=20_000)))
    content = bytearray(archive.read_bytes())
    content[3000:3100] = b"\xff" * 100
    archive.write_bytes(content)
    with pytest.raises(HessianFlowError, match=r"a\.tar\.gz: damaged archive") as caught:
        read_members(archive, {"noise", "absent"}, max_bytes=1 << 20)
    assert "\n" not in str(caught.value)


def test_only_the_named_members_are_read(tmp_path: Path) -> None:
    archive = tar_with(tmp_path / "a.tar.gz", "other")
    assert read_members(archive, {"good.txt", "absent"}, max_bytes=10) == {"good.txt": b"ok"}
