"""The independent libraries that the cross-checks compare with: the extra `crosscheck`.

Where one is missing its tests are skipped. With REQUIRE_CROSSCHECKS=1, as in `.ci/run`, they fail
instead, so that a check that never runs cannot pass for one that holds.
"""

import importlib
import os
import warnings
from types import ModuleType

import pytest

SWITCH = "REQUIRE_CROSSCHECKS"


def library(name: str) -> ModuleType:
    """Import a library, or skip the tests that ask for it.

    Args:
        name: of the module, such as "curvlinops".

    Raises:
        ImportError: it is not installed, and REQUIRE_CROSSCHECKS is 1.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the library and its requirements
        if os.environ.get(SWITCH) == "1":
            return importlib.import_module(name)
        reason = f"{name} is not installed: see CONTRIBUTING.md for the extra `crosscheck`"
        return pytest.importorskip(name, reason=reason, exc_type=ImportError)
