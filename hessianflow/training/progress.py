"""The progress bar of a run: quiet when standard error is not a terminal."""

import time
from typing import Any

from tqdm import tqdm


class ProgressBar:
    """One bar over the examples of the whole run, showing epoch, batch size, rate, loss, accuracy,
    eigenvalue.

    Args:
        total_examples: examples of all epochs.
        done: examples done before (a resumed run).
        show: True always, False never, None only on a terminal.
        refresh_seconds: how often figures are read from the device and shown.
    """

    def __init__(
        self, total_examples: int, done: int, *, show: bool | None, refresh_seconds: float = 0.5
    ) -> None:
        disable = None if show is None else not show
        self._bar: tqdm[Any] = tqdm(
            total=total_examples,
            initial=done,
            disable=disable,
            unit_scale=True,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar:12}| {elapsed}<{remaining}{postfix}",
        )
        self._refresh_seconds = refresh_seconds
        self._next = time.monotonic() + refresh_seconds
        self._pending = 0

    @property
    def is_due(self) -> bool:
        """Whether it is time to read figures and :meth:`show` them."""
        return time.monotonic() >= self._next

    def advance(self, examples: int) -> None:
        """Count examples."""
        self._pending += examples

    def move_to(self, examples: int) -> None:
        """Stand at so many examples, which may be fewer than before."""
        self._bar.update(examples - self._bar.n)
        self._pending = 0

    def show(self, title: str, **figures: float | int | None) -> None:
        """Move the bar on and display figures that are not None."""
        self._next = time.monotonic() + self._refresh_seconds
        self._bar.update(self._pending)
        self._pending = 0
        self._bar.set_description(title, refresh=False)
        shown = {
            k: f"{v:.4g}" if isinstance(v, float) else v
            for k, v in figures.items()
            if v is not None
        }
        self._bar.set_postfix(shown, refresh=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.update(self._pending)
        self._pending = 0
        self._bar.close()
