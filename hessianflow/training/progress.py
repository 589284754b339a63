"""The progress bar of a run, which is silent when standard error is not a terminal."""

import time
from typing import Any

from tqdm import tqdm


class ProgressBar:
    """Shows the examples trained of the whole run, and the latest figures.

    Args:
        total_examples: examples of all epochs.
        done: examples trained before, in a resumed run.
        show: True: always; False: never; None: only on a terminal.
        refresh_seconds: time between two readings of figures from the device.
    """

    def __init__(
        self, total_examples: int, done: int, *, show: bool | None, refresh_seconds: float = 0.5
    ) -> None:
        disable: bool | None = None  # tqdm then asks the terminal.
        if show is not None:
            disable = not show
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
        """Count examples that the next :meth:`show` displays."""
        self._pending += examples

    def move_to(self, examples: int) -> None:
        """Move to `examples`, which may be fewer than before."""
        self._bar.update(examples - self._bar.n)
        self._pending = 0

    def show(self, title: str, **figures: float | int | None) -> None:
        """Advance the bar, and display the figures that are not None."""
        self._next = time.monotonic() + self._refresh_seconds
        self._bar.update(self._pending)
        self._pending = 0
        self._bar.set_description(title, refresh=False)
        shown: dict[str, str | int] = {}
        for name, value in figures.items():
            if isinstance(value, float):
                shown[name] = f"{value:.4g}"
            elif value is not None:
                shown[name] = value
        self._bar.set_postfix(shown, refresh=True)

    def close(self) -> None:
        """Display the examples counted so far, and end the bar."""
        self._bar.update(self._pending)
        self._pending = 0
        self._bar.close()
