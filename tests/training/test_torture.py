"""Real CIFAR-10 pixels, killed at random moments: the run must end as if nothing had happened."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACK = ROOT.parent / "shared" / "data" / "cifar10.py"


@pytest.mark.slow
@pytest.mark.skipif(not PACK.exists(), reason="needs the CIFAR-10 pack beside the checkout")
def test_killed_and_terminated_runs_end_as_the_uninterrupted_one():
    """Growing batches, PGD, augmentation, probe: SIGKILL, SIGTERM, SIGKILL, then compared bit for
    bit.

    The ten-kill version: python experiments/benchmarks/torture.py --kills 10
    """
    script = ROOT / "experiments" / "benchmarks" / "torture.py"
    command = [
        sys.executable,
        str(script),
        "--kills",
        "3",
        "--term",
        "--images",
        "128",
        "--epochs",
        "4",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "interruptions, resumed from [" in done.stdout
    assert " 0 interruptions" not in done.stdout
    assert (
        "equal: weights, optimizer, controller, adversary, probe, data stream and records"
        in done.stdout
    )
