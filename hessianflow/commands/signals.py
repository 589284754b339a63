"""The handling of signals: they raise exceptions, so that a command says why it ends.

If an exception would be raised too late or would do harm, they end the process at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM)
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Signalled(KeyboardInterrupt):
    """The exception that a signal raises; as a KeyboardInterrupt, it starts the same clean-up.

    A plain KeyboardInterrupt that has passed through certain calls from C makes Python end with
    status -2, even if it was caught later; a subclass does not.

    Attributes:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


@contextmanager
def signals_raised(*, own_process: bool) -> Iterator[None]:
    """Make SIGINT and SIGTERM raise :class:`Signalled` while active.

    Unless the process runs only the command (`own_process`), SIGINT keeps its handler, and so
    does SIGTERM if it has one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    defaults: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    handled = [number for number in NUMBERS if signal.getsignal(number) == defaults[number]]
    handler: Callable[[int, FrameType | None], NoReturn] = _raise_or_end
    if not own_process:
        handled = [number for number in handled if number == signal.SIGTERM]
        handler = _raise
    for number in handled:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in handled:
            if signal.getsignal(number) is handler:
                signal.signal(number, defaults[number])


def ignore_signals() -> None:
    """Ignore SIGINT and SIGTERM from now on, so that this process runs to its end."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Make SIGINT and SIGTERM end this process at once, with one line, while active.

    It serves waits inside libraries, where an exception would be raised only on return.
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
        os.close(writing)  # the watcher sees the end of the pipe and returns
        watcher.join()
        os.close(reading)


def _end_when_told(reading: int) -> None:
    """End the process when a signal's number can be read; return at the end of the pipe."""
    while number := os.read(reading, 1):
        if number[0] in NUMBERS:
            _end(number[0])


def _end(number: int) -> NoReturn:
    """End this process at once, with the line and the status of the exception."""
    sys.stderr.write(f"hessianflow: {WORDS[signal.Signals(number)]}\n")
    sys.stderr.flush()
    os._exit(128 + number)


def _raise(number: int, _frame: FrameType | None) -> NoReturn:
    raise Signalled(number)


def _raise_or_end(number: int, frame: FrameType | None) -> NoReturn:
    """Raise the exception, but end the process at once while a module is imported.

    Some libraries catch every exception of an optional import and fail later on the half that was
    imported, and others abort. An import makes nothing that must be saved.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end(number)
        frame = frame.f_back
    raise Signalled(number)
