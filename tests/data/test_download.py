"""Downloads from a server on this machine: whole, resumed, cut off, with another content; and checking local files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from layouts import SMALL, pack_tar, write_cifar_binary

from hessianflow.data import datasets, fetch, verify
from hessianflow.data.cifar import read_cifar
from hessianflow.data.download import MAX_DOWNLOAD_BYTES
from hessianflow.data.sources import SOURCES, Source, default_root
from hessianflow.interfaces import HessianFlowError

CONTENT = bytes(range(256)) * 5000


@dataclass
class Server:
    """Files to serve, how many bytes of each answer to send before hanging up, and the ranges asked for."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    hang_up_after: int | None = None
    ranges: list[str | None] = field(default_factory=list)

    def sources(self, name: str, content: bytes, **options: str) -> dict[str, tuple[Source, ...]]:
        self.files[name] = content
        sum_ = md5(content, usedforsecurity=False).hexdigest()
        return {"a-set": (Source(f"{self.address}/{name}", sum_, len(content), **options),)}


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.ranges.append(asked)
            content = state.files.get(self.path[1:])
            if content is None:
                return self.send_error(404)
            first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
            if asked and first >= len(content):
                return self.send_error(416)
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(content) - first))
            self.end_headers()
            self.wfile.write(content[first:][: state.hang_up_after])
            return None

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.address = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def test_a_file_is_fetched_once_and_checked(server: Server, tmp_path: Path) -> None:
    sources, seen = server.sources("data.bin", CONTENT), []
    root = fetch("a-set", tmp_path / "new", sources=sources, progress=lambda *event: seen.append(event))
    assert root == tmp_path / "new"
    assert (root / "data.bin").read_bytes() == CONTENT
    assert [path.name for path in root.iterdir()] == ["data.bin"]
    assert seen[-1] == ("data.bin", len(CONTENT), len(CONTENT))
    fetch("a-set", root, sources=sources)
    assert server.ranges == [None]
    assert [report.state for report in verify("a-set", root, sources=sources)] == ["ok"]


def test_an_interrupted_download_continues_where_it_stopped(server: Server, tmp_path: Path) -> None:
    sources, server.hang_up_after = server.sources("data.bin", CONTENT), 300_000
    with pytest.raises(
        HessianFlowError, match=r"fetching http://127.* failed \(.*\); run the command again to continue"
    ):
        fetch("a-set", tmp_path, sources=sources)
    assert (tmp_path / "data.bin.part").stat().st_size == 300_000
    assert not (tmp_path / "data.bin").exists()
    server.hang_up_after = None
    fetch("a-set", tmp_path, sources=sources)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-"]


def test_a_complete_part_is_only_renamed(server: Server, tmp_path: Path) -> None:
    sources = server.sources("data.bin", CONTENT)
    (tmp_path / "data.bin.part").write_bytes(CONTENT)
    fetch("a-set", tmp_path, sources=sources)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.ranges == []


def test_a_part_longer_than_the_file_is_dropped(server: Server, tmp_path: Path) -> None:
    sources = server.sources("data.bin", CONTENT)
    (tmp_path / "data.bin.part").write_bytes(CONTENT + b"more")
    fetch("a-set", tmp_path, sources=sources)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_another_content_is_deleted(server: Server, tmp_path: Path) -> None:
    sources = server.sources("data.bin", CONTENT)
    server.files["data.bin"] = b"something else"
    with pytest.raises(HessianFlowError, match=r"data.bin: MD5 is \w+, expected \w+; deleted, fetch it again"):
        fetch("a-set", tmp_path, sources=sources)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_local_file_is_replaced(server: Server, tmp_path: Path) -> None:
    sources = server.sources("data.bin", CONTENT)
    (tmp_path / "data.bin").write_bytes(CONTENT[:-1])
    fetch("a-set", tmp_path, sources=sources)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_an_archive_is_unpacked_whole_or_not_at_all(server: Server, tmp_path: Path) -> None:
    (tmp_path / "made" / "the-set").mkdir(parents=True)
    (tmp_path / "made" / "the-set" / "file.bin").write_bytes(b"content")
    archive = pack_tar(tmp_path / "made" / "the-set", tmp_path / "made" / "set.tar.gz").read_bytes()
    sources = server.sources("set.tar.gz", archive, unpacks_to="the-set")
    root = fetch("a-set", tmp_path / "out", sources=sources)
    assert (root / "the-set" / "file.bin").read_bytes() == b"content"
    assert sorted(path.name for path in root.iterdir()) == ["set.tar.gz", "the-set"]
    other = server.sources("set.tar.gz", archive, unpacks_to="another")
    with pytest.raises(HessianFlowError, match=r"set.tar.gz: holds no folder another; get it again"):
        fetch("a-set", root, sources=other)
    assert sorted(path.name for path in root.iterdir()) == ["set.tar.gz", "the-set"]


def test_a_server_that_does_not_have_it_is_named(server: Server, tmp_path: Path) -> None:
    sources = server.sources("data.bin", CONTENT)
    server.files.clear()
    with pytest.raises(HessianFlowError, match=r"fetching .*data.bin to .* failed \(HTTPError: HTTP Error 404"):
        fetch("a-set", tmp_path, sources=sources)


def test_a_server_that_sends_without_end_is_cut_off(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert max(source.size for files in SOURCES.values() for source in files) < MAX_DOWNLOAD_BYTES
    monkeypatch.setattr("hessianflow.data.download.MAX_DOWNLOAD_BYTES", 300_000)
    with pytest.raises(HessianFlowError, match="sent more than 300000 bytes; stopped"):
        fetch("a-set", tmp_path, sources=server.sources("data.bin", CONTENT))


def test_a_folder_that_cannot_be_made_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(HessianFlowError, match=r"failed \((FileExists|NotADirectory)Error"):
        fetch("a-set", tmp_path / "file" / "below", sources=server.sources("data.bin", CONTENT))


def test_verify_says_what_is_missing_and_what_is_damaged(tmp_path: Path) -> None:
    reports = verify("svhn", tmp_path)
    assert [(report.state, report.path.name) for report in reports] == [
        ("missing", "train_32x32.mat"),
        ("missing", "test_32x32.mat"),
    ]
    assert reports[0].detail == "get it from http://ufldl.stanford.edu/housenumbers/train_32x32.mat"
    (tmp_path / "train_32x32.mat").write_bytes(b"abc")
    (report, _) = verify("svhn", tmp_path)
    assert report.state == "damaged"
    assert "expected e26dedcc434d2e4c54c9b2d4a06d8373" in report.detail
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"abc")
    (report,) = verify("cifar10", tmp_path)
    assert (report.state, report.detail) == ("damaged", "3 bytes, expected 170052171")


def test_verify_reads_unpacked_files_where_the_archive_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar_binary(SMALL["cifar10"], tmp_path)
    (report,) = verify("cifar10", tmp_path)
    assert (report.state, report.path.name) == ("damaged", "cifar-10-batches-bin")
    assert "data_batch_1.bin: found 30730 bytes, expected 30730000 bytes" in report.detail
    monkeypatch.setattr(datasets, "read_cifar", lambda layout, *rest: read_cifar(SMALL[layout.name], *rest))
    (report,) = verify("cifar10", tmp_path)
    assert (report.state, report.detail) == ("ok", "unpacked, 50 examples for training and 10 for testing")


def test_sets_without_files_to_get_are_named(tmp_path: Path) -> None:
    with pytest.raises(HessianFlowError, match="imagenet is given out by its owners after registration"):
        fetch("imagenet", tmp_path)
    with pytest.raises(HessianFlowError, match="no files to get for data set 'digits'; known: cifar10, cifar100, svhn"):
        verify("digits", tmp_path)


def test_the_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HESSIANFLOW_DATA", str(tmp_path))
    assert default_root() == tmp_path
    monkeypatch.delenv("HESSIANFLOW_DATA")
    assert default_root() == Path.home() / ".cache/hessianflow/data"
