"""Processes that train together are forked from a server that has imported what they need."""

import pytest
from forked import warm


@pytest.fixture(scope="session", autouse=True)
def warm_forkserver() -> None:
    warm()
