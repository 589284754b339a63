"""The connection to Ray, made when it is first needed."""

import logging
import os
import socket
from typing import Any

from hessianflow.interfaces import HessianFlowError


def connect(address: str | None = None, *, num_cpus: int | None = None) -> Any:
    """Connect to a Ray cluster, or start a local one; returns the `ray` module. A connection that exists is used.

    No usage is reported and no dashboard started.

    Args:
        address: of a running cluster ("auto", "10.0.0.1:6379", "ray://..."); None: a local one, ended with the process.
        num_cpus: of a local cluster; default: those of the machine.

    Raises:
        HessianFlowError: Ray is not installed, or does not run at `address`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A local cluster would run workers at the lowest priority but four: anything else on the machine would starve them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Keep Ray's next behaviour for actors without GPUs, without its warning about the change.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
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
            ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, logging_level=logging.WARNING)
        else:
            ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise HessianFlowError(f"no Ray cluster answers at {address or 'local'}: {reason}") from error
    return ray


def _check_reachable(address: str | None) -> None:
    """Refuse a host and port where nothing listens: Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise HessianFlowError(f"no Ray cluster answers at {address}: {error}") from error
