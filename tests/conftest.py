"""How the tests run: markers, several processes, and the one Ray of all tests.

pytest puts the folder of a conftest on the path: so every test can import the modules beside this
file.
"""

import os
import sys
from pathlib import Path

import pytest

# One thread for each process, before torch is imported: the processes share the processors.
os.environ.setdefault("OMP_NUM_THREADS", "1")
MOST_PROCESSES = 4


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Spread a run of all tests over the processors, unless it says how with `-n`.

    A run of named files stays in this process, where a debugger works and no worker must start.
    """
    options = config.option
    if hasattr(config, "workerinput"):  # a worker: starts none, and is not told what is set below
        options.loadgroup = True
        return
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if not everything or options.usepdb or options.trace or options.collectonly:
        return
    if getattr(options, "numprocesses", 0) is not None:  # given, or pytest-xdist is not there
        return
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    if processors > 1:
        options.numprocesses = min(processors, MOST_PROCESSES)
        options.dist = "loadgroup"
        options.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts processes, and keep together what shares a fixture.

    All tests on Ray run in one process, so that there is one Ray; the others stay with their file,
    unless it says that they need nothing of each other (`SPREAD = True`). Ray's come first: they
    wait for processes, and the others fill the time.
    """
    for item in items:
        if "ray" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
            item.add_marker(pytest.mark.xdist_group("ray"))
        elif not getattr(getattr(item, "module", None), "SPREAD", False):
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
        if item.path.parent.name == "distributed":
            item.add_marker(pytest.mark.ranks)
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


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
