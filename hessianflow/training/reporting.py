"""The output of a run while it trains: rows, events and a progress bar."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from hessianflow.interfaces import HessianFlowError, Progress, RecordSink
from hessianflow.runs import Recorder, rows
from hessianflow.runs.environment import in_notebook
from hessianflow.runs.rows import Record
from hessianflow.training.checks import as_list, check_parts
from hessianflow.training.course import Course

REFRESH_SECONDS = 0.5
"""Time between two readings of figures from the device. This default is our choice."""


@dataclass(frozen=True)
class Reporting:
    """Settings of the output of a run, besides that to its directory.

    Attributes:
        sinks: receivers of every record.
        config: settings to write to config.json besides the trainer's own.
        show_progress: whether a progress bar is shown; None shows one on a terminal or in a
            notebook.
    """

    sinks: Iterable[RecordSink] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    show_progress: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sinks", as_list("sinks", self.sinks))
        check_parts(sinks=self.sinks)
        if self.show_progress not in (True, False, None):
            raise HessianFlowError(
                "Reporting.show_progress must be True, False or None (on a terminal), got"
                f" {self.show_progress!r}"
            )


class ProgressBar:
    """Shows the share of the run that is over, the time that is left, and the latest figures.

    It appears always if `show` is True, never if it is False, and on a terminal or in a notebook if
    it is None.
    """

    def __init__(self, progress: Progress, show: bool | None) -> None:
        disable: bool | None = None  # tqdm then asks the terminal.
        if show is not None:
            disable = not show
        elif in_notebook():  # a notebook is not a terminal
            disable = False
        self._bar: tqdm[Any] = tqdm(
            total=1.0,
            initial=progress.fraction,
            disable=disable,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar:12}| {elapsed}<{remaining}{postfix}",
        )
        self._next = time.monotonic() + REFRESH_SECONDS

    @property
    def is_due(self) -> bool:
        """Whether it is time to read figures and :meth:`show` them."""
        return time.monotonic() >= self._next

    def move_to(self, progress: Progress) -> None:
        """Move to the place of the run, which may lie before the last one after a rollback."""
        self._bar.update(progress.fraction - self._bar.n)

    def show(self, progress: Progress, figures: Mapping[str, float | int | None]) -> None:
        """Move the bar, and display the epoch and the figures that are not None."""
        self._next = time.monotonic() + REFRESH_SECONDS
        self.move_to(progress)
        epoch = f"epoch {progress.epoch + 1}"
        if progress.total_epochs is not None:
            number = min(progress.epoch + 1, progress.total_epochs)
            epoch = f"epoch {number}/{progress.total_epochs}"
        self._bar.set_description(epoch, refresh=False)
        shown: dict[str, str | int] = {}
        for name, value in figures.items():
            if isinstance(value, float):
                shown[name] = f"{value:.4g}"
            elif value is not None:
                shown[name] = value
        self._bar.set_postfix(shown, refresh=True)

    def close(self) -> None:
        """Close the bar and leave it as it is shown."""
        self._bar.close()


class Reporter:
    """Writes rows and events of a run, and moves the progress bar of the present training.

    The record has a directory and sinks on rank 0 alone.
    """

    def __init__(self, record: Recorder, course: Course, show_progress: bool | None) -> None:
        self.record = record
        self._course = course
        self._show_progress = show_progress
        self._said: set[str] = set()

    def begin(self) -> None:
        """Show a progress bar from now on."""
        self.bar = ProgressBar(self._course.progress, self._show_progress)

    def event(self, event: str, message: str) -> None:
        """Record that something happened."""
        self.record.write(rows.event_row(self._course.progress, event, message))

    def say_once(self, event: str, message: str) -> None:
        """Record an event, unless the run has one of this kind already."""
        if event not in self._said and not self.record.has_event(event):
            self.event(event, message)
        self._said.add(event)

    def write_all(self, rows_left: list[Record]) -> None:
        """Write the rows, each of which leaves the list: after an error none is written twice."""
        while rows_left:
            self.record.write(rows_left.pop(0))

    def end(self) -> None:
        """Show how far the run has come, and end the progress bar."""
        self.bar.move_to(self._course.progress)
        self.bar.close()

    def show(self, **figures: float | int | None) -> None:
        """Show figures beside the bar; None is left out."""
        self.bar.show(self._course.progress, figures)
