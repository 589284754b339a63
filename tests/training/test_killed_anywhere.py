"""A kill before any operation on a file: the directory can be resumed or started again, and nothing
is left behind."""

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import SHARE

SPREAD = True


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="kills forked processes")
@pytest.mark.parametrize(("kind", "stride"), [("growing", 4), ("rollback", 4), ("dual-batch", 8)])
def test_a_run_killed_before_any_operation_ends_as_if_it_never_had_been(
    kind: str, stride: int, tmp_path: Path
):
    if SHARE == 1:
        stride = 1
    command = [
        sys.executable,
        str(Path(__file__).with_name("killed_anywhere.py")),
        kind,
        str(tmp_path),
        str(stride),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"killed before every {stride}., 0 bad" in done.stdout
