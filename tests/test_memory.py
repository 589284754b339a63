"""The C library's own counter of page faults is the oracle: memory that was kept needs none."""

import platform
import subprocess
import sys

import pytest

import hessianflow as hf

FAULTS = """
import resource, sys
import torch, hessianflow as hf

if sys.argv[1] == "kept":
    print(hf.keep_freed_memory())
else:
    print(False)
for round in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.zeros(4 * 2**20) for _ in range(8)]  # of 16 MiB: 4096 pages of 4 KiB each
    del held
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> tuple[str, int]:
    """What the setting answered, and the page faults of eight blocks of 16 MiB, once the heap has settled."""
    command = [sys.executable, "-c", FAULTS, way]
    done = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return done[0], int(done[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of the GNU C library")
def test_freed_memory_is_kept() -> None:
    answer, kept = faults("kept")
    assert answer == "True"
    # Not 0: a system short of memory may take back pages of its own accord.
    assert kept < faults("given back")[1] / 4, "the same memory serves again"


def test_a_library_without_the_setting_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _name: object())
    assert hf.keep_freed_memory() is False
