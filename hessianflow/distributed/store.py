"""The key-value stores through which ranks find each other, reachable from no farther than they
must be.

Torch's own store listens on every address of the machine and asks nobody for a name, and whoever
writes to it can lead ranks to another machine. Here it listens on one address: that of this machine
alone where all ranks are on it. On a cluster the network between the nodes has to be trusted: a
secret among the keys would help little, as the store tells its keys to whoever asks, and gloo and
NCCL ask nobody either.
"""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from hessianflow.interfaces import HessianFlowError

LOCAL = "127.0.0.1"
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def serve(
    address: str = LOCAL, port: int = 0, *, timeout: timedelta = timedelta(seconds=300)
) -> TCPStore:
    """Return a store that listens on one address of this machine.

    An address that others reach this machine by, but that it does not have itself (behind a
    translation of addresses), cannot be listened on: then the store listens on all of them.

    Args:
        address: a name or number of this machine.
        port: 0: any that is free; the store's `port` says which.
        timeout: of the store's own calls.

    Raises:
        HessianFlowError: the port is taken, or torch could not serve there.
    """
    own: int | None = None
    try:
        family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(place[:2], family=family, backlog=1024)
        port = listener.getsockname()[1]
        own = listener.detach()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise HessianFlowError(
                f"port {port} of {address} is taken: name another, or end what uses it"
            ) from error
    try:
        return TCPStore(
            address, port, None, True, timeout, wait_for_workers=False, master_listen_fd=own
        )
    except RuntimeError as error:
        raise HessianFlowError(
            f"no store at {address}:{port}: {str(error).splitlines()[0]}"
        ) from error


@contextmanager
def gloo_on_this_machine() -> Iterator[None]:
    """While a group is formed, let gloo listen on this machine's own address alone, unless the user
    named another."""
    names = (
        [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        if os.name == "posix"
        else []
    )
    if not names or _GLOO_INTERFACE in os.environ:
        yield
        return
    os.environ[_GLOO_INTERFACE] = names[0]
    try:
        yield
    finally:
        os.environ.pop(_GLOO_INTERFACE, None)
