"""How far a grid is: a live line on a terminal, else a line per job."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live


class Progress:
    """Counts jobs as they start and end.

    Args:
        victims: to train.
        cells: to measure.
        before: cells of the grid that are not to be measured.
    """

    def __init__(self, victims: int, cells: int, before: int) -> None:
        self.victims, self.cells, self.before = victims, cells, before
        self.trained = self.measured = self.failed = self.running = 0
        self.start = time.monotonic()
        self.console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self.live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator["Progress"]:
        """Keep the live line on the terminal while the block runs."""
        if not self.console.is_terminal:
            yield self
            return
        with Live(self, console=self.console, refresh_per_second=2, transient=True) as self.live:
            yield self

    def __rich__(self) -> str:
        return self.line()

    def started(self) -> None:
        """A job began."""
        self.running += 1

    def again(self) -> None:
        """A job ended without a result, and will begin again."""
        self.running -= 1

    def ended(self, what: Any, *, cell: bool, seconds: float, problem: str = "") -> None:
        """A job ended."""
        self.running -= 1
        self.measured += cell
        self.trained += not cell
        self.failed += bool(problem) and cell
        if problem:
            self.console.print(f"failed: {what}: {problem}")
        elif self.live is None:
            done = f"cell {self.measured}/{self.cells}" if cell else f"victim {self.trained}/{self.victims}"
            self.console.print(f"{done}  {what}  {seconds:.1f} s{self._left()}")

    def line(self) -> str:
        """All counts in one line."""
        victims = f"victims {self.trained} of {self.victims}, " if self.victims else ""
        cells = f"cells {self.measured - self.failed} of {self.cells} done, {self.failed} failed"
        before = f", {self.before} left alone" if self.before else ""
        return f"{victims}{cells}{before}, {self.running} running{self._left()}"

    def _left(self) -> str:
        """The time left, as far as the cells so far tell; victims that are still to train count as they took."""
        jobs, ended = self.victims + self.cells, self.trained + self.measured
        if ended in (0, jobs):
            return ""
        return f", {duration((time.monotonic() - self.start) / ended * (jobs - ended))} left"


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(42), duration(200), duration(9000)
    ('42 s', '3 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
