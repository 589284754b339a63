"""SIGTERM as an exception: so that a command that is ended says so, whatever it is doing."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM came: to whoever cleans up after a Ctrl-C it is the same."""


@contextmanager
def termination_raised() -> Iterator[None]:
    """While active, SIGTERM raises :class:`Terminated`, unless the program around has a handler of its own."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _raise:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise(_number: int, _frame: Any) -> NoReturn:
    raise Terminated
