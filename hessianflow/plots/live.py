"""A figure of a run that is redrawn after every epoch, in a notebook or in a file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hessianflow.plots.training_curves import training_curves
from hessianflow.runs.environment import in_notebook
from hessianflow.runs.history import History


class Live:
    """A sink that draws the records of a run after every epoch.

    Pass it as `reporting=hf.training.Reporting(sinks=[hf.plots.live()])`. In a notebook, every new
    figure replaces the one before below the cell. If `path` is given, the figure is also written
    there.

    Args:
        path: File for a PNG, which is complete at any time; None writes none.
        draw: Function that draws a :class:`~hessianflow.runs.History`, such as
            `hf.plots.curvature_trajectory`.

    Attributes:
        figure: The newest figure; None before the first epoch.
    """

    def __init__(
        self, path: str | Path | None = None, *, draw: Callable[..., Figure] = training_curves
    ) -> None:
        self._path = path
        self._draw = draw
        self._records: list[Mapping[str, Any]] = []
        self._config: Mapping[str, Any] = {}
        self._display: Any = None
        self.figure: Figure | None = None

    def configure(self, config: Mapping[str, Any]) -> None:
        """Take the settings of the run, which some figures need."""
        self._config = config

    def write(self, record: Mapping[str, Any]) -> None:
        """Keep one record, and draw all of them at the end of an epoch."""
        self._records.append(record)
        if record["kind"] == "epoch":
            self._redraw()

    def close(self) -> None:
        """Draw the records that followed the last epoch, if there are any."""
        if self.figure is not None and self._records[-1]["kind"] != "epoch":
            self._redraw()

    def _redraw(self) -> None:
        history = History([dict(record) for record in self._records], self._config)
        figure = self._draw(history, self._path)
        self.figure = figure
        if not in_notebook():
            return
        from IPython.display import display

        if self._display is None:
            self._display = display(figure, display_id=True)
        else:
            self._display.update(figure)


def live(path: str | Path | None = None, *, draw: Callable[..., Figure] = training_curves) -> Live:
    """Return a sink that draws the run after every epoch; see :class:`Live`."""
    return Live(path, draw=draw)
