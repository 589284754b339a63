"""The key-value stores through which ranks find each other, exposed as little as possible.

By default torch's store listens on every address of the machine without authentication, and anyone
who writes to it can lead ranks to another machine. Here it listens on one address, the loopback
address if all ranks are on this machine. On a cluster the network between the nodes must be
trusted: a secret key would help little, since the store reveals its keys on request, and gloo and
NCCL do not authenticate either.
"""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from hessianflow.interfaces.errors import HessianFlowError, first_line

LOCAL = "127.0.0.1"
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def serve(
    address: str = LOCAL, port: int = 0, *, timeout: timedelta = timedelta(seconds=300)
) -> TCPStore:
    """Return a store that listens on one address of this machine.

    If the machine itself does not have the address (behind a translation of addresses), the store
    listens on all its addresses. A port of 0 stands for any free one, which the store's `port`
    names; the timeout is that of the store's own calls.

    Raises:
        HessianFlowError: The port is taken, or torch could not serve there.
    """
    own: int | None = None
    try:
        family, _, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(target[:2], family=family, backlog=1024)
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
        raise HessianFlowError(f"no store at {address}:{port}: {first_line(error)}") from error


@contextmanager
def gloo_on_this_machine() -> Iterator[None]:
    """Make gloo listen on the loopback address alone, unless the user named an interface."""
    names: list[str] = []
    if os.name == "posix":
        names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if not names or _GLOO_INTERFACE in os.environ:
        yield
        return
    os.environ[_GLOO_INTERFACE] = names[0]
    try:
        yield
    finally:
        os.environ.pop(_GLOO_INTERFACE, None)
