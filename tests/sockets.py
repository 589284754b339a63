"""Where this process can be reached, as the kernel tells it."""

import os
import socket
import struct
from pathlib import Path

import pytest

_LISTENING = "0A"


def listening(pid: int | None = None) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket on which a process, this one by default, waits for
    connections."""
    folder = Path("/proc") / str(pid or os.getpid())
    if not (folder / "net" / "tcp").exists():
        pytest.skip("this system does not tell which sockets are open")
    own = {os.readlink(entry) for entry in (folder / "fd").iterdir() if entry.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in (folder / "net" / table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING and f"socket:[{fields[9]}]" in own:
                address, port = fields[1].split(":")
                found.add((_readable(address), int(port, 16)))
    return found


def _readable(address: str) -> str:
    """The kernel writes words of four bytes, each in the machine's own order."""
    words = [address[start : start + 8] for start in range(0, len(address), 8)]
    raw = b"".join(struct.pack("=I", int(word, 16)) for word in words)
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)
