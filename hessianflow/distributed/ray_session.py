"""The connection to Ray, which is made when it is first needed."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hessianflow.interfaces.errors import HessianFlowError, first_line


def connect(address: str | None = None, *, num_cpus: int | None = None) -> Any:
    """Connect to a Ray cluster, or start a local one, and return the `ray` module.

    An existing connection is used. No usage is reported, and no dashboard is started.

    Args:
        address: Address of a running cluster ("auto", "10.0.0.1:6379", "ray://..."); None for a
            local one, which ends with the process.
        num_cpus: CPUs of a local cluster; None for those of the machine.

    Raises:
        HessianFlowError: Ray is not installed, or does not run at `address`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # By default a local cluster runs workers at so low a priority that other programs starve them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # This selects Ray's future behaviour for actors without GPUs, and avoids its warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None and "ray" not in sys.modules:  # Ray reads the variable at import
        # Ray's processes listen on all addresses of the machine, so they must require a token.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError:
        raise HessianFlowError("elastic runs need Ray: pip install 'hessianflow[ray]'") from None
    _check_reachable(address)  # even if there is a connection, a wrong address is an error
    if ray.is_initialized():
        return ray
    # With "local", Ray ignores a stale address file of an earlier cluster.
    options: dict[str, Any] = {"address": address or "local"}
    if address is None:
        options |= {"num_cpus": num_cpus, "include_dashboard": False}
    try:
        ray.init(**options, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError, AssertionError, ray.exceptions.RayError) as error:
        raise HessianFlowError(
            f"no Ray cluster answers at {address or 'local'}: {first_line(error)}"
        ) from error
    return ray


def endings(ray: Any) -> tuple[type[Exception], ...]:
    """Return the errors that Ray raises if the process of an actor has ended."""
    names = ("RayActorError", "OutOfMemoryError", "NodeDiedError", "WorkerCrashedError")
    return tuple(getattr(ray.exceptions, name) for name in names if hasattr(ray.exceptions, name))


def answer(ray: Any, ref: Any) -> Any:
    """Return the answer of an actor, and raise a HessianFlowError of its code as such."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, HessianFlowError):
            raise error.cause from None
        raise


@contextmanager
def told_in_one_line(ray: Any) -> Iterator[None]:
    """Turn failures of Ray itself, but not of the code that it runs, into an error of one line."""
    try:
        yield
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        raise HessianFlowError(
            f"Ray failed: {first_line(error)}; look at its logs, then resume the run"
        ) from error


def _check_reachable(address: str | None) -> None:
    """Refuse a host and port where nothing listens, since Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError, ValueError) as error:
            raise HessianFlowError(f"no Ray cluster answers at {address}: {error}") from error
