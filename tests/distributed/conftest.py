import os
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ray():
    """A local Ray for all tests that need one; workers can import the modules of this folder.

    These tests kill, hang and slow down real processes and watch the clock, so a busy machine can fail them, and they
    take minutes: they run when HESSIANFLOW_RAY_TESTS=1 is set.
    """
    if os.environ.get("HESSIANFLOW_RAY_TESTS") != "1":
        pytest.skip("minutes of real Ray processes, against the clock: set HESSIANFLOW_RAY_TESTS=1 to run them")
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'hessianflow[ray]'")
    from hessianflow.distributed.ray_session import connect

    paths = [str(Path(__file__).parent), *sys.path]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    module = connect(num_cpus=8)
    yield module
    module.shutdown()
