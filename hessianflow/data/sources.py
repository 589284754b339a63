"""Addresses, sizes and checksums of the official files of each data set."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import environ
from pathlib import Path

from hessianflow.checks import in_home
from hessianflow.interfaces import HessianFlowError


@dataclass(frozen=True)
class Source:
    """One official file of a data set.

    Attributes:
        url, md5: Address at which it is published, and its MD5 in hexadecimal.
        size: Size in bytes, 0 where it is not known beforehand.
        unpacks_to: Folder that an archive unpacks to; empty for a file that is used as it is.
    """

    url: str
    md5: str
    size: int = 0
    unpacks_to: str = ""

    @property
    def file(self) -> str:
        """Return the file's own name."""
        return self.url.rsplit("/", 1)[-1]


_TORONTO = "https://www.cs.toronto.edu/~kriz"
_SVHN = "http://ufldl.stanford.edu/housenumbers"

SOURCES: Mapping[str, tuple[Source, ...]] = {
    "cifar10": (
        Source(
            f"{_TORONTO}/cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
            170_052_171,
            "cifar-10-batches-bin",
        ),
    ),
    "cifar100": (
        Source(
            f"{_TORONTO}/cifar-100-binary.tar.gz",
            "03b5dce01913d631647c71ecec9e9cb8",
            168_513_733,
            "cifar-100-binary",
        ),
    ),
    "svhn": (
        Source(f"{_SVHN}/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", 182_040_794),
        Source(f"{_SVHN}/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", 64_275_384),
    ),
    "svhn-extra": (
        Source(f"{_SVHN}/extra_32x32.mat", "a93ce644f1a588dc4d68dda5feec44a7", 1_329_278_602),
    ),
    "tiny-imagenet": (
        Source(
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            "90528d7ca1a48142e341f4ef8d21d0de",
            248_100_043,
            "tiny-imagenet-200",
        ),
    ),
}
"""Files that :func:`hessianflow.data.fetch` downloads. ImageNet is not among them: its owners
require a registration."""


def root_folder(root: str | Path | None) -> Path:
    """Return the data folder `root`; None stands for :func:`default_root`."""
    if root is None:
        return default_root()
    return in_home(root, "data folder")


def default_root() -> Path:
    """Return the default data folder: $HESSIANFLOW_DATA, else ~/.cache/hessianflow/data."""
    variable = environ.get("HESSIANFLOW_DATA")
    if variable:
        return in_home(variable, "$HESSIANFLOW_DATA")
    return in_home("~/.cache/hessianflow/data")


def find_archive(root: Path, name: str) -> Path | None:
    """Return the archive `name` in the folder `root`, or `root` where it is the archive itself."""
    candidates = (path for path in (root / name, root) if path.name == name)
    return next((path for path in candidates if path.is_file()), None)


def remedy(name: str) -> str:
    """Return the end of an error message, which says how to get the data set `name`."""
    addresses = " and ".join(source.url for source in SOURCES[name])
    return f"get it with `hessianflow data fetch {name}` or from {addresses}"


def damaged(name: str, file: object, what: str) -> HessianFlowError:
    """Return the error for a damaged file of data set `name`; it also says how to get the file."""
    return HessianFlowError(f"{file}: {what}; {remedy(name)}")


def one_line(error: Exception) -> str:
    """Return the type and message of an error, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())
