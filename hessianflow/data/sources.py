"""Where the official files of each data set are, and how to tell them from others."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import environ
from pathlib import Path

from hessianflow.checks import in_home
from hessianflow.interfaces import HessianFlowError


@dataclass(frozen=True)
class Source:
    """One official file.

    Attributes:
        url: where it is published.
        md5: of the file.
        size: in bytes, 0 where it is not known beforehand.
        unpacks_to: the folder an archive turns into; empty for a file that is used as it is.
    """

    url: str
    md5: str
    size: int = 0
    unpacks_to: str = ""

    @property
    def file(self) -> str:
        """The file's own name."""
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
"""Files that :func:`hessianflow.data.fetch` gets. ImageNet is not among them: its owners ask for a
registration."""


def default_root() -> Path:
    """Return where data is looked for when no folder is given: $HESSIANFLOW_DATA, else
    ~/.cache/hessianflow/data."""
    given = environ.get("HESSIANFLOW_DATA")
    return in_home(given, "$HESSIANFLOW_DATA") if given else in_home("~/.cache/hessianflow/data")


def remedy(name: str) -> str:
    """Return how to get a data set, to end an error message with."""
    return (
        f"get it with `hessianflow data fetch {name}` or from"
        f" {' and '.join(s.url for s in SOURCES[name])}"
    )


def damaged(name: str, file: object, what: str) -> HessianFlowError:
    """Return the error for a file of data set `name` that is not as it should be, with the way
    out."""
    return HessianFlowError(f"{file}: {what}; {remedy(name)}")


def one_line(error: Exception) -> str:
    """Return the kind and words of an error, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())
