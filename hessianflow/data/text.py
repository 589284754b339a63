"""Text as bytes: files are joined to one sequence and cut into blocks, each of which is an example.

The vocabulary is the 256 values of a byte, so any file is text, in any encoding. Some files are
held out for evaluation: those whose name, relative to the folder, has a hash in the lowest tenth of
all values. A file therefore stays in its split when other files come or go. The files are joined in
the order of their hashes, with a zero byte after each, so that the first examples come from all
over the folder. Of a single file, the last tenth is held out.
"""

import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob, has_magic
from hashlib import blake2b
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from hessianflow.data.files import open_plain
from hessianflow.data.streams import ExampleStream
from hessianflow.interfaces import HessianFlowError

BYTES = 256
BLOCK_LENGTH = 128
"""Bytes in an example. This default is our choice."""
HELD_OUT = 0.1
"""Share of the files, or of a single file, that is held out. This default is our choice."""
_NOT_OURS = ("site-packages", "dist-packages", "__pycache__", "test", "tests")
"""Folders of the standard library that are left out: other packages, caches, and tests, which some
installations lack."""


@dataclass(frozen=True, eq=False)
class TextSet:
    """One split of a text held in memory, as blocks of bytes.

    Example i has the bytes [i * T, (i + 1) * T) as inputs and [i * T + 1, (i + 1) * T + 1) as
    targets, T being the length of a block. Bytes after the last whole block are left out.

    Attributes:
        name: Name of the set.
        text: The bytes, uint8 [N].
        block_length: Bytes in an example.
    """

    name: str
    text: Tensor
    block_length: int = BLOCK_LENGTH

    @property
    def num_classes(self) -> int:
        """Return the number of values of a byte."""
        return BYTES

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Return the shape (T,) of an example."""
        return (self.block_length,)

    def __len__(self) -> int:
        return max(len(self.text) - 1, 0) // self.block_length

    def in_blocks(self, block_length: int) -> "TextSet":
        """Return the same text in blocks of another length.

        Raises:
            HessianFlowError: The text is shorter than a block and the byte after it.
        """
        if len(self.text) <= block_length:
            raise HessianFlowError(
                f"{self.name}: {len(self.text)} bytes are too few for a block of {block_length} and"
                " the byte after it: use more text or shorter blocks"
            )
        return replace(self, block_length=block_length)

    def take(self, count: int) -> "TextSet":
        """Return a set of the first `count` examples, or of all if there are fewer."""
        return replace(self, text=self.text[: count * self.block_length + 1])

    def batches(
        self,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> "TextBatches":
        """Return batches of all blocks on `device`, shuffled only if `train`."""
        return TextBatches(
            self.text, self.block_length, batch_size, seed=seed, device=device, shuffle=train
        )


class TextBatches(ExampleStream):
    """Resumable batches of blocks of bytes, whose size may change at any time.

    Iterating yields (inputs, targets), both int64 [n, T]; the target of a byte is the byte after
    it. The text stays on the device as bytes, and each batch is gathered from it. For the order,
    `batch_size`, `seed` and `shuffle`, see :class:`~hessianflow.data.streams.ExampleStream`.

    Args:
        text: Bytes, uint8 [N].
        block_length: Bytes T in an example.
        device: Device that holds the text and the batches.

    Raises:
        HessianFlowError: The text is shorter than a block and the byte after it.
    """

    num_classes = BYTES

    def __init__(
        self,
        text: Tensor,
        block_length: int,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        shuffle: bool = True,
    ) -> None:
        super().__init__((len(text) - 1) // block_length, batch_size, seed=seed, shuffle=shuffle)
        self.input_shape = (block_length,)
        # A view: each row is a block and the byte after it, which also begins the next block.
        self._blocks = text.to(device).unfold(0, block_length + 1, block_length)
        self._plan: tuple[int, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Return the device that holds the text and its batches."""
        return self._blocks.device

    @property
    def value_range(self) -> NoReturn:
        """Raise an error, because bytes cannot be attacked."""
        raise HessianFlowError(
            "the inputs are bytes, which no attack can change slightly: train without an adversary"
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._handed_out(self._planned_batch)

    def examples(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the examples at `indices` (int64 [n]); the stream does not move."""
        blocks = self._blocks.index_select(0, indices.to(self.device)).long()
        return blocks[:, :-1].contiguous(), blocks[:, 1:].contiguous()

    def _planned_batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        if self._plan is None or self._plan[0] != self._epoch:
            self._plan = self._epoch, self._order().to(self.device)
        return self.examples(self._plan[1][start:stop])


def read_text(root: Path, split: str) -> TextSet:
    """Read one split of any text.

    Args:
        root: A folder, a pattern such as "books/*.txt", or a single file. Of a folder, all files
            are read, also in its subfolders, except names that begin with a dot.
        split: "train" or "test".

    Raises:
        HessianFlowError: There is no such file, or no text in the files.
    """
    if root.is_file():
        return _split_of_file(root, split)
    if has_magic(str(root)) and not root.exists():
        files = sorted(Path(found) for found in glob(str(root), recursive=True))
        base = Path(*[part for part in root.parts if not has_magic(part)])
    elif root.is_dir():
        files = sorted(root.rglob("*"))
        base = root
    else:
        raise HessianFlowError(f"{root}: no such file or folder; name the text with --data-dir")
    names = {_name(path, base): path for path in files if path.is_file()}
    shown = {name: path for name, path in names.items() if not _is_hidden(name)}
    return TextSet("text", _joined(shown, split, str(root)))


def read_python(_: Path, split: str) -> TextSet:
    """Read one split of the standard library's source files, from the running Python.

    Raises:
        HessianFlowError: The installation has no source files.
    """
    library = Path(sysconfig.get_path("stdlib"))
    paths = {_name(path, library): path for path in sorted(library.rglob("*.py"))}
    own = {name: path for name, path in paths.items() if not set(name.split("/")) & set(_NOT_OURS)}
    return TextSet("python", _joined(own, split, str(library)))


def held_out(names: Sequence[str]) -> set[str]:
    """Return the names of the files that are held out: at least one, but not all."""
    ordered = sorted(names, key=_share)
    count = sum(_share(name) < HELD_OUT for name in ordered)
    return set(ordered[: min(max(count, 1), len(ordered) - 1)])


def _share(name: str) -> float:
    """Return a hash of a name, uniform in [0, 1)."""
    digest = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _name(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix()


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _joined(files: dict[str, Path], split: str, where: str) -> Tensor:
    """Return the bytes of the files of one split, in the order of their hashes."""
    texts = {name: path for name, path in files.items() if path.stat().st_size > 0}
    if not texts:
        raise HessianFlowError(
            f"{where} holds no text, because it has no file that is not empty: name other files"
        )
    if len(texts) == 1:
        (only,) = texts.values()
        return _split_of_file(only, split).text
    for_tests = held_out(list(texts))
    chosen = [name for name in texts if (name in for_tests) == (split == "test")]
    joined = bytearray()
    for name in sorted(chosen, key=_share):
        joined += _content(texts[name]) + b"\0"
    return _tensor(joined)


def _split_of_file(path: Path, split: str) -> TextSet:
    """Return the beginning of a file for training, or its last tenth for testing."""
    content = _content(path)
    if not content:
        raise HessianFlowError(f"{path} holds no text, because it is empty: name another file")
    first_held_out = round(len(content) * (1 - HELD_OUT))
    part = content[:first_held_out]
    if split == "test":
        part = content[first_held_out:]
    return TextSet("text", _tensor(bytearray(part)))


def _tensor(content: bytearray) -> Tensor:
    if not content:  # torch refuses an empty buffer
        return torch.zeros(0, dtype=torch.uint8)
    return torch.frombuffer(content, dtype=torch.uint8)


def _content(path: Path) -> bytes:
    try:
        with open_plain(path) as file:
            return file.read()
    except OSError as error:
        raise HessianFlowError(f"{path}: {error.strerror or error}") from None
