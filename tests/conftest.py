"""pytest puts the folder of a conftest on the path: so every test can import the modules beside
this file."""

import os
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ray():
    """One local Ray of three processors for all tests that need one; workers can import the modules
    of this folder.

    Nothing in these tests watches the clock: faults happen at chosen updates, and the test waits
    for what it needs.
    """
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'hessianflow[ray]'")
    from hessianflow.distributed.ray_session import connect

    paths = [str(Path(__file__).parent), *sys.path]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    module = connect(num_cpus=3)
    yield module
    module.shutdown()
