"""The log lines of the command, which appear on standard error above the progress bar."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _AboveTheBar(logging.Handler):
    """A handler that writes lines without tearing the progress bar below them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line of a record."""
        from tqdm import tqdm

        tqdm.write(f"hessianflow: {self.format(record)}", file=sys.stderr)


@contextmanager
def logging_to_stderr(level: str | None) -> Iterator[None]:
    """Write the messages of the logger "hessianflow" to standard error while active.

    The least severe `level` is "info" on a terminal and "warning" elsewhere if it is None.
    """
    if level is None and sys.stderr.isatty():
        level = "info"
    logger = logging.getLogger("hessianflow")
    handler = _AboveTheBar()
    previous_level = logger.level
    previous_propagate = logger.propagate
    logger.setLevel((level or "warning").upper())
    logger.propagate = False  # a root handler of the calling program would repeat the line
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(previous_level)
        logger.propagate = previous_propagate
