"""Signals as exceptions, so that a command that is ended says so; and an end where exceptions would wait or harm."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM)
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Signalled(KeyboardInterrupt):
    """A signal came: to whoever cleans up after a Ctrl-C any of them is the same.

    Python itself ends with status -2 if a plain KeyboardInterrupt has passed through certain calls from C, even where
    it was caught later; of this one it takes no notice.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


@contextmanager
def signals_raised(*, own_process: bool) -> Iterator[None]:
    """Make SIGINT and SIGTERM raise :class:`Signalled` while active.

    Args:
        own_process: whether nothing but the command runs here. If not, SIGINT stays as it is, and SIGTERM too if there
            is a handler for it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    defaults: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    ours = [number for number in NUMBERS if signal.getsignal(number) == defaults[number]]
    if not own_process:
        ours = [number for number in ours if number == signal.SIGTERM]
    handler = _raise_or_end if own_process else _raise
    for number in ours:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is handler:
                signal.signal(number, defaults[number])


def ignore_signals() -> None:
    """Let nothing end this process any more but its own end."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Make SIGINT and SIGTERM end this process at once, with one line, while active.

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
        if number[0] in NUMBERS:
            _end(number[0])


def _end(number: int) -> NoReturn:
    """End this process as if the exception had been caught, without a look at what it is doing."""
    sys.stderr.write(f"hessianflow: {WORDS[signal.Signals(number)]}\n")
    sys.stderr.flush()
    os._exit(128 + number)


def _raise(number: int, _frame: FrameType | None) -> NoReturn:
    raise Signalled(number)


def _raise_or_end(number: int, frame: FrameType | None) -> NoReturn:
    """Raise, but end at once while a module is imported.

    Some libraries catch every exception of an import that they can do without, and fail later on the half that was
    left; others abort. Nothing that should be saved is made by an import.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end(number)
        frame = frame.f_back
    raise Signalled(number)
