"""Check at the start that all ranks run the same program, which wrong weights would show later."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hessianflow.interfaces import AgreedError
from hessianflow.interfaces.world import GroupReducer


def code_fingerprint(files: Sequence[str | Path] = ()) -> str:
    """Return a hash of this package's sources, torch's version and further files (the script)."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in [*sorted(package.rglob("*.py")), *map(Path, files)]:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def check_same_program(reducer: GroupReducer, settings: Mapping[str, Any], code: str) -> None:
    """Refuse ranks that differ, on all of them, before anything is trained.

    Args:
        reducer: Reducer of the group.
        settings: Plain values that decide the run, by name, without those that may differ (rank,
            device index).
        code: Result of :func:`code_fingerprint`.

    Raises:
        AgreedError: A rank differs from rank 0. Every rank raises it, and the message names the
            rank and the difference.
    """
    everyone = reducer.gather((dict(settings), code))
    reference, reference_code = everyone[0]
    for rank, (theirs, their_code) in enumerate(everyone):
        for name in [*reference, *theirs]:
            if reference.get(name, _ABSENT) != theirs.get(name, _ABSENT):
                raise AgreedError(
                    f"all ranks must have the same settings: {name} is"
                    f" {reference.get(name, _ABSENT)!r} on rank 0 but {theirs.get(name, _ABSENT)!r}"
                    f" on rank {rank}; start every rank with the same command"
                )
        if their_code != reference_code:
            raise AgreedError(
                f"all ranks must run the same code: rank 0 has {reference_code} but rank {rank} has"
                f" {their_code}; install the same versions of hessianflow, torch and the script"
                " everywhere"
            )


_ABSENT = "absent"
