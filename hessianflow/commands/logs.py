"""Log lines of the command: on standard error, above the progress bar."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _AboveTheBar(logging.Handler):
    """Writes a line without tearing the progress bar below it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        from tqdm import tqdm

        tqdm.write(f"hessianflow: {self.format(record)}", file=sys.stderr)


@contextmanager
def logging_to_stderr(level: str | None) -> Iterator[None]:
    """While active, what is logged to "hessianflow" at `level` or above is written to standard
    error.

    None: "info" where standard error is a terminal, "warning" elsewhere.
    """
    if level is None:
        level = "info" if sys.stderr.isatty() else "warning"
    logger, handler = logging.getLogger("hessianflow"), _AboveTheBar()
    before = logger.level, logger.propagate
    logger.setLevel(level.upper())
    logger.propagate = False  # else a root handler of the program around would say it again
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
