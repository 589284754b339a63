"""Processes that train together, started fast: from a server that has imported what they need."""

import multiprocessing
from multiprocessing import forkserver

import pytest

from hessianflow.distributed.launch import PRELOAD


@pytest.fixture(scope="session", autouse=True)
def warm_forkserver() -> None:
    """Import the modules of the ranks once, not in every process of every test.

    A server that runs keeps what it has imported, whatever is asked of it later.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "pytest", "trainers"])
    forkserver.ensure_running()
