"""Text as bytes: blocks, held-out files, the order, resumption and refusals."""

import os
import sysconfig
from pathlib import Path

import pytest
import torch

from hessianflow.data import TextBatches, TextSet, load
from hessianflow.data.text import HELD_OUT, held_out
from hessianflow.interfaces import HessianFlowError


def text_set(content: bytes, block_length: int) -> TextSet:
    return TextSet("text", torch.tensor(list(content), dtype=torch.uint8), block_length)


def read(root: Path | str, split: str = "train", block_length: int = 2) -> bytes:
    found = load("text", root, split, block_length=block_length)  # type: ignore[arg-type]
    assert isinstance(found, TextSet)
    return bytes(found.text.tolist())


def test_an_example_is_a_block_and_the_bytes_after_it() -> None:
    """Eleven bytes hold two whole blocks of four that are followed by another byte."""
    batches = text_set(b"abcdefghijk", 4).batches(8, train=False)
    ((inputs, targets),) = list(batches)
    assert [bytes(row.tolist()) for row in inputs] == [b"abcd", b"efgh"]
    assert [bytes(row.tolist()) for row in targets] == [b"bcde", b"fghi"]
    assert inputs.dtype == targets.dtype == torch.int64
    assert (batches.num_examples, batches.num_classes, batches.input_shape) == (2, 256, (4,))


def test_the_first_examples_are_those_of_the_first_bytes() -> None:
    whole = text_set(bytes(range(100)), 8)
    few = whole.take(3)
    assert len(few) == 3
    indices = torch.arange(3)
    for mine, theirs in zip(
        few.batches(1, train=False).examples(indices),
        whole.batches(1, train=False).examples(indices),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    assert len(whole.take(99)) == len(whole) == 12


def shuffled(seed: int = 0) -> TextBatches:
    return text_set(bytes(range(201)), 2).batches(8, train=True, seed=seed)


def test_an_epoch_has_every_block_once_in_an_order_of_the_seed() -> None:
    first = torch.cat([inputs[:, 0] for inputs, _ in shuffled()])
    assert sorted(first.tolist()) == list(range(0, 200, 2))
    assert torch.equal(first, torch.cat([inputs[:, 0] for inputs, _ in shuffled()]))
    assert not torch.equal(first, torch.cat([inputs[:, 0] for inputs, _ in shuffled(1)]))


def test_a_changed_batch_size_and_a_resumption_keep_the_order() -> None:
    whole = torch.cat([inputs for inputs, _ in shuffled()])
    batches = shuffled()
    iterator = iter(batches)
    parts = [next(iterator)[0], next(iterator)[0]]
    batches.set_batch_size(32)
    parts.append(next(iterator)[0])
    later = shuffled()
    later.load_state_dict(batches.state_dict())
    parts += [inputs for inputs, _ in later]
    assert [len(part) for part in parts[:4]] == [8, 8, 32, 32]
    assert torch.equal(torch.cat(parts), whole)


def test_the_text_is_held_once_as_bytes() -> None:
    batches = text_set(bytes(1001), 10).batches(4, train=True)
    assert batches._blocks.dtype == torch.uint8
    assert batches._blocks.untyped_storage().nbytes() == 1001


def folder_of(tmp_path: Path, count: int = 40) -> Path:
    for number in range(count):
        file = tmp_path / "books" / f"part{number % 3}" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(f"<{number}>".encode() * 3)
    return tmp_path / "books"


def pieces(content: bytes) -> set[bytes]:
    return set(content.rstrip(b"\0").split(b"\0"))


def test_whole_files_are_held_out_and_keep_their_place(tmp_path: Path) -> None:
    root = folder_of(tmp_path)
    train, test = pieces(read(root)), pieces(read(root, "test"))
    assert not train & test
    assert train | test == {f"<{n}>".encode() * 3 for n in range(40)}
    (root / "new.txt").write_bytes(b"something else")
    assert pieces(read(root)) | {b"something else"} >= train
    assert pieces(read(root, "test")) >= test


def test_a_tenth_of_many_names_is_held_out_but_never_none_or_all() -> None:
    names = [f"folder/{number}.py" for number in range(5000)]
    # Six standard deviations of a binomial share.
    assert abs(len(held_out(names)) / 5000 - HELD_OUT) < 6 * (0.09 / 5000) ** 0.5
    for first in range(50):
        assert len(held_out(names[first : first + 2])) == 1


def test_a_file_need_not_be_utf_8_and_hidden_and_empty_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "secret").write_bytes(b"not this")
    (tmp_path / "empty").touch()
    (tmp_path / "one").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "two").write_bytes(b"\x80\x81\x82")
    found = {read(tmp_path), read(tmp_path, "test")}
    assert found == {b"\xff\xfe\xfd\0", b"\x80\x81\x82\0"}


def test_the_last_tenth_of_a_single_file_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_bytes(bytes(range(100)))
    for root in (file, tmp_path, f"{tmp_path}/*.txt"):
        assert read(root) == bytes(range(90))
        assert read(root, "test") == bytes(range(90, 100))


def test_a_pattern_chooses_files(tmp_path: Path) -> None:
    root = folder_of(tmp_path)
    (root / "part0" / "notes.md").write_bytes(b"no text file")
    train = pieces(read(f"{root}/*/*.txt")) | pieces(read(f"{root}/*/*.txt", "test"))
    assert train == {f"<{n}>".encode() * 3 for n in range(40)}


def test_the_python_set_reads_the_standard_library() -> None:
    splits = [load("python", split=split) for split in ("train", "test")]
    texts = [bytes(split.text.tolist()) for split in splits if isinstance(split, TextSet)]
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "json/decoder.py", "zipfile.py", "email/message.py"):
        if (library / name).is_file():
            source = (library / name).read_bytes()
            assert sum(source in text for text in texts) == 1, name
    assert len(texts[0]) > 4 * len(texts[1]) > 1_000_000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", r"missing: no such file or folder; name the text with --data-dir"),
        ("empty", r"empty holds no text, because it has no file that is"),
        ("*.nothing", r"\*\.nothing holds no text"),
        ("nothing.txt", r"nothing\.txt holds no text, because it is empty"),
        ("short.txt", r"text: 4 bytes are too few for a block of 8 and the byte after it"),
    ],
)
def test_places_without_text_are_refused_in_a_line(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.txt").touch()
    (tmp_path / "short.txt").write_bytes(b"abcd")
    with pytest.raises(HessianFlowError, match=message) as raised:
        read(f"{tmp_path}/{name}", block_length=8)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read every file")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    root = folder_of(tmp_path)
    (root / "part0" / "0.txt").chmod(0)
    with pytest.raises(HessianFlowError, match=r"0\.txt: Permission denied"):
        read(root), read(root, "test")


def test_bytes_cannot_be_attacked() -> None:
    with pytest.raises(HessianFlowError, match="bytes, which no attack can change slightly"):
        _ = shuffled().value_range
