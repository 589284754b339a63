"""The connection to Ray, made when it is first needed."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hessianflow.interfaces import HessianFlowError


def connect(address: str | None = None, *, num_cpus: int | None = None) -> Any:
    """Connect to a Ray cluster, or start a local one; returns the `ray` module. A connection that
    exists is used.

    No usage is reported and no dashboard started.

    Args:
        address: of a running cluster ("auto", "10.0.0.1:6379", "ray://..."); None: a local one,
            ended with the process.
        num_cpus: of a local cluster; default: those of the machine.

    Raises:
        HessianFlowError: Ray is not installed, or does not run at `address`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A local cluster would run workers at the lowest priority but four: anything else on the
    # machine would starve them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Keep Ray's next behaviour for actors without GPUs, without its warning about the change.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None and "ray" not in sys.modules:  # Ray reads it while it is imported
        # Ray's processes listen on all addresses of the machine: they are to answer to those who
        # know a token only.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError:
        raise HessianFlowError("elastic runs need Ray: pip install 'hessianflow[ray]'") from None
    _check_reachable(address)  # also beside a connection: the address was meant
    if ray.is_initialized():
        return ray
    try:
        if address is None:
            # "local": a stale address file of an earlier cluster must not be believed.
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                logging_level=logging.WARNING,
            )
        else:
            ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError, AssertionError, ray.exceptions.RayError) as error:
        raise HessianFlowError(
            f"no Ray cluster answers at {address or 'local'}: {first_line(error)}"
        ) from error
    return ray


def endings(ray: Any) -> tuple[type[Exception], ...]:
    """Return what Ray raises where the process that was asked has ended, for whatever reason."""
    names = ("RayActorError", "OutOfMemoryError", "NodeDiedError", "WorkerCrashedError")
    return tuple(getattr(ray.exceptions, name) for name in names if hasattr(ray.exceptions, name))


def answer(ray: Any, ref: Any) -> Any:
    """Return what an actor answers; an error of its own code comes as itself where it says what to
    do."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, HessianFlowError):
            raise error.cause from None
        raise


@contextmanager
def told_in_one_line(ray: Any) -> Iterator[None]:
    """Turn failures of Ray itself into an error of one line; those of the code that it runs pass as
    they are."""
    try:
        yield
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        raise HessianFlowError(
            f"Ray failed: {first_line(error)}; look at its logs, then resume the run"
        ) from error


def first_line(error: BaseException) -> str:
    """Of an error's message, or its type where it has none: Ray's messages hold whole
    tracebacks."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_reachable(address: str | None) -> None:
    """Refuse a host and port where nothing listens: Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError, ValueError) as error:
            raise HessianFlowError(f"no Ray cluster answers at {address}: {error}") from error
