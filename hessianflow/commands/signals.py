"""SIGTERM as an exception, so that a command that is ended says so; and an end where exceptions have to wait."""

import os
import signal
import sys
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


@contextmanager
def ended_at_once() -> Iterator[None]:
    """While active, SIGINT and SIGTERM end this process at once, with a line.

    For waits within libraries: an exception would be raised only when they return.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_end_when_told, args=[reading], daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writing)  # the watcher reads the end, and goes
        watcher.join()
        os.close(reading)


def _end_when_told(reading: int) -> None:
    """End the process when a signal's number can be read, return at the end of the pipe."""
    while number := os.read(reading, 1):
        if number[0] in (signal.SIGINT, signal.SIGTERM):
            word = "terminated" if number[0] == signal.SIGTERM else "interrupted"
            sys.stderr.write(f"hessianflow: {word}\n")
            sys.stderr.flush()
            os._exit(128 + number[0])


def _raise(_number: int, _frame: Any) -> NoReturn:
    raise Terminated
