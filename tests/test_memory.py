"""The system's own count of the memory that a process holds is the oracle."""

import platform
import subprocess
import sys

import pytest

import hessianflow as hf

RESIDENT = """
import sys
from pathlib import Path
import torch, hessianflow as hf

def pages():
    return int(Path("/proc/self/statm").read_text().split()[1])

answer = hf.keep_freed_memory() if sys.argv[1] == "kept" else None
before = pages()
held = [torch.zeros(4 * 2**20) for _ in range(8)]  # 128 MiB in blocks of 16
del held
print(answer, pages() - before)
"""


def left(way: str) -> tuple[str, float]:
    """What the setting answered, and how much of 128 MiB the process still holds when they are
    free, in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, way], check=True, capture_output=True, text=True
    )
    answer, pages = done.stdout.split()
    return answer, int(pages) * 4096 / 2**20


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of the GNU C library")
def test_freed_memory_is_kept() -> None:
    answer, kept = left("kept")
    assert answer == "True"
    assert kept > 96
    assert left("given back")[1] < 32


def test_a_library_without_the_setting_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _name: object())
    assert hf.keep_freed_memory() is False
