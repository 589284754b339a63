"""A search for faults in everything that reads files of data: hundreds of damaged and hostile ones.

Each must be read, or refused in one line: without another error, within seconds, in bounded memory,
and without a trace outside the folder that it was given. A family of cases runs in a process of its
own, which may not take more memory than it is allowed.
"""

import json
import multiprocessing
import os
import resource
import signal
from dataclasses import replace
from hashlib import md5
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import FAMILIES
from layouts import RECORDS, SMALL, jpeg

from hessianflow import data
from hessianflow.data.archives import unpack
from hessianflow.data.cifar import read_cifar
from hessianflow.data.svhn import read_svhn
from hessianflow.data.tiny_imagenet import TinyLayout, read_tiny_imagenet
from hessianflow.interfaces import HessianFlowError

pytestmark = pytest.mark.slow

SECONDS = 20
"""For a case; the machine may be busy."""
MEMORY = 512 << 20
"""That a family may add to what its process has when it starts: the largest image allowed has 268
MB."""
CASES = 300
"""At least so many over all families."""


def put(path: Path, what: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(what, bytes):
        path.write_bytes(what)
    else:
        what(path)
    return path


def attempt(family: str, name: str, what: Any, folder: Path) -> None:
    """Read one case as a user's command would."""
    layout = SMALL["cifar10"]
    if family == "tars":
        put(folder / layout.binary_archive, what)
        read_cifar(layout, folder, "test")
    elif family == "pickles":
        put(folder / layout.python_folder / "test_batch", what)
        sums = {
            **layout.python_files,
            "test": {"test_batch": md5(what, usedforsecurity=False).hexdigest()},
        }
        read_cifar(replace(layout, python_files=sums), folder, "test")
    elif family == "mats":
        put(folder / "train_32x32.mat", what)
        read_svhn(folder, "train", records={"train": RECORDS})
    elif family == "zips":
        put(folder / "tiny-imagenet-200.zip", what)
        for split in ("train", "test"):
            read_tiny_imagenet(folder, split, layout=TinyLayout(2, 3, 2))
    elif family == "unpacked":
        unpack(
            put(folder / ("a.zip" if name.endswith(".zip") else "a.tar.gz"), what), folder / "out"
        )
    else:
        put(folder / "train" / "a" / "0.jpg", what)
        put(folder / "train" / "b" / "0.png", jpeg((0, 0, 250)))
        images = data.load("folder", folder, "train", image_size=8)
        for index in range(len(images)):
            images[index]


def survey(family: str, root: str, line: Connection) -> None:
    """Try all cases of a family; tell of each what came of it, and first that it begins."""
    rng, folder = np.random.default_rng(0), Path(root)
    (folder / "making").mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    for number, (name, what) in enumerate(FAMILIES[family](folder / "making", rng)):
        own = folder / f"case {number}"
        own.mkdir()
        line.send(name)
        # Not before: what makes the cases may need more. Threads and their stacks are counted too.
        resource.setrlimit(resource.RLIMIT_AS, (virtual + (4 << 30), resource.RLIM_INFINITY))
        signal.alarm(SECONDS)
        try:
            attempt(family, name, what, own)
            outcome = "read"
        except HessianFlowError as error:
            outcome = (
                "refused" if "\n" not in str(error) and len(str(error)) < 1000 else f"long: {error}"
            )
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        line.send(outcome)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line.send(None)
    line.send((after - before) * 1024)


def escaped(root: Path) -> list[str]:
    """Files that hostile archives brought, in any place but the folder that their own was unpacked
    to."""
    evil = (path.relative_to(root) for path in root.rglob("*") if "evil" in path.name)
    return sorted(str(path) for path in evil if path.parts[2:3] != ("out",))


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="needs Linux, to limit the memory"
)
def test_hundreds_of_damaged_and_hostile_files(tmp_path: Path) -> None:
    found: dict[str, str] = {}
    grown: dict[str, int] = {}
    context = multiprocessing.get_context("spawn")
    for family in FAMILIES:
        (tmp_path / family).mkdir()
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=survey, args=(family, str(tmp_path / family), theirs))
        process.start()
        theirs.close()
        name = "its start"
        try:
            while (name := ours.recv()) is not None:
                found[f"{family}: {name}"] = ours.recv()
            grown[family] = ours.recv()
        except EOFError:
            process.join()
            found[f"{family}: {name}"] = f"the process ended with status {process.exitcode}"
        process.join()
    wrong = {case: outcome for case, outcome in found.items() if outcome not in ("read", "refused")}
    assert not wrong, json.dumps(wrong, indent=1)
    assert len(found) >= CASES
    assert sum(outcome == "refused" for outcome in found.values()) > CASES // 2
    assert {family: size for family, size in grown.items() if size > MEMORY} == {}
    assert escaped(tmp_path) == []
    assert not Path("/evil").exists()
