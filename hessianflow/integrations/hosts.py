"""The releases of other trainers that the integrations work with."""

import re
from importlib.metadata import PackageNotFoundError, version

from hessianflow.interfaces import HessianFlowError

Release = tuple[int, ...]


def check_host(package: str, least: Release, below: Release) -> None:
    """Refuse a package that is not installed, or whose release is outside [least, below).

    The extra of hessianflow that installs a package has the same name as the package.

    Raises:
        HessianFlowError: The package is absent or of another release; the message names the range
            and the extra.
    """
    wanted = f"{package}>={_text(least)},<{_text(below)}"
    remedy = f"pip install 'hessianflow[{package}]'"
    try:
        found = version(package)
    except PackageNotFoundError:
        raise HessianFlowError(
            f"hessianflow.integrations.{package} needs {wanted}, which is not installed: {remedy}"
        ) from None
    if not least <= _release(found) < below:
        raise HessianFlowError(
            f"hessianflow.integrations.{package} works with {wanted}, got {found}: {remedy}"
        )


def _release(text: str) -> Release:
    """Return the leading numbers of a version: (5, 24, 0) of "5.24.0.dev0"."""
    found = re.match(r"\d+(\.\d+)*", text)
    if found is None:
        return ()
    return tuple(map(int, found.group().split(".")))


def _text(release: Release) -> str:
    return ".".join(map(str, release))
