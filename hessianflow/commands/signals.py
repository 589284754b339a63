"""Turns signals into exceptions, so that a command says why it ends, or ends the process at once.

It ends the process where an exception would be raised too late, or would do harm.
"""

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
    """A signal came. As a KeyboardInterrupt, it runs whatever cleans up after a Ctrl-C.

    Python itself ends with status -2 once a plain KeyboardInterrupt has passed through certain
    calls from C, even if it was caught later. A subclass has no such effect.

    Attributes:
        number: the number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


@contextmanager
def signals_raised(*, own_process: bool) -> Iterator[None]:
    """Make SIGINT and SIGTERM raise :class:`Signalled` while active.

    Args:
        own_process: whether this process runs nothing but the command. If not, SIGINT keeps its
            handler, and so does SIGTERM if it has one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    defaults: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
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
    """Ignore SIGINT and SIGTERM from here on, so that this process runs to its end."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Make SIGINT and SIGTERM end this process at once, with one line, while active.

    This is for waits inside libraries, where an exception would be raised only on return.
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
    """End this process at once, with the line and status that the exception would have led to."""
    sys.stderr.write(f"hessianflow: {WORDS[signal.Signals(number)]}\n")
    sys.stderr.flush()
    os._exit(128 + number)


def _raise(number: int, _frame: FrameType | None) -> NoReturn:
    raise Signalled(number)


def _raise_or_end(number: int, frame: FrameType | None) -> NoReturn:
    """Raise, but end at once while a module is imported.

    Some libraries catch every exception of an optional import, and fail later on what is half
    imported; others abort. An import makes nothing that would have to be saved.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end(number)
        frame = frame.f_back
    raise Signalled(number)
