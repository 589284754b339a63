"""Downloads from a server on this machine: whole, resumed, cut off, with another content; and
checking local files."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from layouts import SMALL, pack_tar, write_cifar_binary

from hessianflow.data import datasets, fetch, load, verify
from hessianflow.data.cifar import read_cifar
from hessianflow.data.download import MAX_DOWNLOAD_BYTES
from hessianflow.data.sources import SOURCES, Source, default_root
from hessianflow.interfaces import HessianFlowError

CONTENT = bytes(range(256)) * 5000


@dataclass
class Server:
    """Files to serve, how many bytes of each answer to send before hanging up, headers to change
    (empty: left out), where to send the client instead; and the ranges asked for."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    hang_up_after: int | None = None
    ranges: list[str | None] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    redirect: str = ""

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
            if state.redirect:
                self.send_response(302)
                self.send_header("Location", state.redirect)
                return self.end_headers()
            first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
            if asked and first >= len(content):
                return self.send_error(416)
            self.send_response(206 if asked else 200)
            for name, value in {
                "Content-Length": str(len(content) - first),
                **state.headers,
            }.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            with suppress(ConnectionError):  # the client may hang up
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
    root = fetch(
        "a-set", tmp_path / "new", sources=sources, progress=lambda *event: seen.append(event)
    )
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
        HessianFlowError,
        match=r"fetching http://127.* failed \(.*\); run the command again to continue",
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
    with pytest.raises(
        HessianFlowError, match=r"data.bin: MD5 is \w+, expected \w+; deleted, fetch it again"
    ):
        fetch("a-set", tmp_path, sources=sources)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mine", [CONTENT[:-1], CONTENT[:-1] + b"?"])
def test_a_file_of_the_users_own_is_not_overwritten(
    server: Server, mine: bytes, tmp_path: Path
) -> None:
    """Of another size, and of the same."""
    sources = server.sources("data.bin", CONTENT)
    (tmp_path / "data.bin").write_bytes(mine)
    with pytest.raises(
        HessianFlowError, match=r"data.bin: .*, expected \w+; not overwritten: move or delete it"
    ):
        fetch("a-set", tmp_path, sources=sources)
    assert (tmp_path / "data.bin").read_bytes() == mine
    assert server.ranges == []
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]


@pytest.mark.parametrize("kind", ["folder", "dangling link", "pipe"])
def test_what_is_in_the_way_of_a_file_stays(server: Server, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    {
        "folder": path.mkdir,
        "dangling link": lambda: path.symlink_to("gone"),
        "pipe": lambda: os.mkfifo(path),
    }[kind]()
    before = path.lstat()
    with pytest.raises(
        HessianFlowError, match=r"data.bin: is in the way of http.*, and no file; move it away"
    ):
        fetch("a-set", tmp_path, sources=server.sources("data.bin", CONTENT))
    assert path.lstat() == before
    assert server.ranges == []


@pytest.mark.parametrize("kind", ["link", "dangling link", "second name", "pipe", "folder"])
def test_a_part_is_not_written_through(server: Server, kind: str, tmp_path: Path) -> None:
    precious, part = tmp_path / "precious", tmp_path / "data.bin.part"
    precious.write_bytes(b"mine")
    {
        "link": lambda: part.symlink_to(precious),
        "dangling link": lambda: part.symlink_to(tmp_path / "new"),
        "second name": lambda: part.hardlink_to(precious),
        "pipe": lambda: os.mkfifo(part),
        "folder": part.mkdir,
    }[kind]()
    with pytest.raises(
        HessianFlowError, match=r"data.bin.part: is no file of a download .*; move it away"
    ):
        fetch("a-set", tmp_path, sources=server.sources("data.bin", CONTENT))
    assert precious.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin.part", "precious"]


def test_two_fetches_do_not_write_to_the_same_part(server: Server, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / "data.bin.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(
            HessianFlowError, match=r"data.bin.part: another fetch is at work on it"
        ):
            fetch("a-set", tmp_path, sources=server.sources("data.bin", CONTENT))
    fetch("a-set", tmp_path, sources=server.sources("data.bin", CONTENT))
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("length", ["many", "-5", "9" * 5000, "1e3", "5, 5"])
def test_a_length_that_is_no_number_is_named(server: Server, length: str, tmp_path: Path) -> None:
    sources = server.sources("data.bin", CONTENT)
    server.headers["Content-Length"] = length
    with pytest.raises(
        HessianFlowError, match=r"data.bin: the server announces '.*' bytes, which is no number"
    ) as e:
        fetch("a-set", tmp_path, sources=sources)
    assert len(str(e.value)) < 300
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize(
    "target", ["http://[", "http://a:b:c/", "nowhere://x", "http:///", "http://" + "a" * 100 + "/"]
)
def test_a_redirect_to_no_address_is_named(server: Server, target: str, tmp_path: Path) -> None:
    sources = server.sources("data.bin", CONTENT)
    server.redirect = target
    with pytest.raises(
        HessianFlowError, match=r"(it, or where it leads, is no address|failed) \(.*\)"
    ) as caught:
        fetch("a-set", tmp_path, sources=sources)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    gc.collect()  # urllib leaves the answer that redirects open


@pytest.mark.parametrize(
    "url", ["data.bin", "/data.bin", "http://[/data.bin", "://data.bin", "http://a\x00b/data.bin"]
)
def test_an_address_that_is_none_is_named(url: str, tmp_path: Path) -> None:
    with pytest.raises(
        HessianFlowError, match=r"(it, or where it leads, is no address|failed) \(.*\)"
    ):
        fetch("a-set", tmp_path, sources={"a-set": (Source(url, "0" * 32),)})
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_sends_more_than_the_known_size_is_cut_off(
    server: Server, tmp_path: Path
) -> None:
    """Announced or not; and a part that is too long is begun anew."""
    sources = server.sources("data.bin", CONTENT)
    server.files["data.bin"] = CONTENT + b"more"
    with pytest.raises(
        HessianFlowError, match=r"would send 1280004 bytes, at most 1280000 are expected; stopped"
    ):
        fetch("a-set", tmp_path, sources=sources)
    server.headers["Content-Length"] = ""
    with pytest.raises(HessianFlowError, match=r"sent more than 1280000 bytes; stopped"):
        fetch("a-set", tmp_path, sources=sources)
    server.headers.clear()
    server.files["data.bin"] = CONTENT
    (tmp_path / "data.bin.part").write_bytes(b"x" * (len(CONTENT) + 1))
    fetch("a-set", tmp_path, sources=sources)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_home_is_expanded(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = server.sources("data.bin", CONTENT)
    assert fetch("a-set", "~/data", sources=sources) == tmp_path / "data"
    assert [report.state for report in verify("a-set", "~/data", sources=sources)] == ["ok"]
    for use in (
        lambda: fetch("a-set", "~nosuchuser/x", sources=sources),
        lambda: load("cifar10", "~nosuchuser/x"),
    ):
        with pytest.raises(
            HessianFlowError, match="data folder ~nosuchuser/x: no home folder is known"
        ):
            use()
    with pytest.raises(HessianFlowError, match="holds a zero byte"):
        fetch("a-set", "a\0b", sources=sources)


def test_an_archive_is_unpacked_whole_or_not_at_all(server: Server, tmp_path: Path) -> None:
    (tmp_path / "made" / "the-set").mkdir(parents=True)
    (tmp_path / "made" / "the-set" / "file.bin").write_bytes(b"content")
    archive = pack_tar(tmp_path / "made" / "the-set", tmp_path / "made" / "set.tar.gz").read_bytes()
    sources = server.sources("set.tar.gz", archive, unpacks_to="the-set")
    root = fetch("a-set", tmp_path / "out", sources=sources)
    assert (root / "the-set" / "file.bin").read_bytes() == b"content"
    assert sorted(path.name for path in root.iterdir()) == ["set.tar.gz", "the-set"]
    other = server.sources("set.tar.gz", archive, unpacks_to="another")
    with pytest.raises(
        HessianFlowError, match=r"set.tar.gz: holds no folder another; get it again"
    ):
        fetch("a-set", root, sources=other)
    assert sorted(path.name for path in root.iterdir()) == ["set.tar.gz", "the-set"]


def test_a_server_that_does_not_have_it_is_named(server: Server, tmp_path: Path) -> None:
    sources = server.sources("data.bin", CONTENT)
    server.files.clear()
    with pytest.raises(
        HessianFlowError, match=r"fetching .*data.bin to .* failed \(HTTPError: HTTP Error 404"
    ):
        fetch("a-set", tmp_path, sources=sources)


def test_a_server_that_sends_without_end_is_cut_off(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(
        0 < source.size < MAX_DOWNLOAD_BYTES for files in SOURCES.values() for source in files
    )
    monkeypatch.setattr("hessianflow.data.download.MAX_DOWNLOAD_BYTES", 300_000)
    (source,) = server.sources("data.bin", CONTENT)["a-set"]
    server.headers["Content-Length"] = ""
    with pytest.raises(HessianFlowError, match="sent more than 300000 bytes; stopped"):
        fetch("a-set", tmp_path, sources={"a-set": (replace(source, size=0),)})


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
    assert report.detail == "3 bytes, expected 182040794"
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"abc")
    (report,) = verify("cifar10", tmp_path)
    assert (report.state, report.detail) == ("damaged", "3 bytes, expected 170052171")


def test_verify_reads_unpacked_files_where_the_archive_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar_binary(SMALL["cifar10"], tmp_path)
    (report,) = verify("cifar10", tmp_path)
    assert (report.state, report.path.name) == ("damaged", "cifar-10-batches-bin")
    assert "data_batch_1.bin: found 30730 bytes, expected 30730000 bytes" in report.detail
    monkeypatch.setattr(
        datasets, "read_cifar", lambda layout, *rest: read_cifar(SMALL[layout.name], *rest)
    )
    (report,) = verify("cifar10", tmp_path)
    assert (report.state, report.detail) == (
        "ok",
        "unpacked, 50 examples for training and 10 for testing",
    )


def test_sets_without_files_to_get_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        HessianFlowError, match="imagenet is given out by its owners after registration"
    ):
        fetch("imagenet", tmp_path)
    with pytest.raises(
        HessianFlowError,
        match="no files to get for data set 'digits'; known: cifar10, cifar100, svhn",
    ):
        verify("digits", tmp_path)


def test_the_default_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HESSIANFLOW_DATA", str(tmp_path))
    assert default_root() == tmp_path
    monkeypatch.delenv("HESSIANFLOW_DATA")
    assert default_root() == Path.home() / ".cache/hessianflow/data"
