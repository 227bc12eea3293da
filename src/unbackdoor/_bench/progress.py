"""The progress of a grid: a live line on a terminal, few lines elsewhere, at the pace of `_progress`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.live import Live

from unbackdoor import _progress
from unbackdoor._errors import SENTENCE, printable

FAILURES = 3  # number of failures that are shown as they happen; the store keeps all of them


class Progress:
    """Counts jobs as they start and end.

    Args:
        victims: number of victims to train.
        cells: number of cells to measure.
        before: number of cells of the grid that are not measured.
    """

    def __init__(self, victims: int, cells: int, before: int) -> None:
        self.victims, self.cells, self.before = victims, cells, before
        self.trained = self.measured = self.failed = self.problems = self.running = 0
        self.start = time.monotonic()
        self.console = _progress.stderr()

    @contextmanager
    def shown(self) -> Iterator["Progress"]:
        """Keep the live line on the terminal while the block runs."""
        if not _progress.is_terminal(self.console):
            yield self
            return
        with Live(self, console=self.console, refresh_per_second=2, transient=True):
            yield self

    def __rich__(self) -> str:
        return self.line()

    def started(self) -> None:
        """Count a job that began."""
        self.running += 1

    def again(self) -> None:
        """Count a job that ended without a result and will begin again."""
        self.running -= 1

    def ended(self, what: Any, *, cell: bool, problem: str = "") -> None:
        """Count a job that ended; `problem` says why it failed."""
        self.running -= 1
        self.measured += cell
        self.trained += not cell
        self.failed += bool(problem) and cell
        self.problems += bool(problem)
        if problem and self.problems <= FAILURES:
            self.console.print(f"failed: {printable(what, SENTENCE)}: {printable(problem, SENTENCE)}")
        if not _progress.is_terminal(self.console) and _progress.pace.due(time.monotonic()):
            self.console.print(self.line())

    def line(self) -> str:
        """Returns all counts in one line."""
        victims = f"victims {self.trained} of {self.victims}, " if self.victims else ""
        cells = f"cells {self.measured - self.failed} of {self.cells} done, {self.failed} failed"
        before = f", {self.before} left alone" if self.before else ""
        return f"{victims}{cells}{before}, {self.running} running{self._left()}"

    def _left(self) -> str:
        """Returns the time left, estimated from the jobs so far."""
        jobs, ended = self.victims + self.cells, self.trained + self.measured
        if ended in (0, jobs):
            return ""
        return f", {_progress.duration((time.monotonic() - self.start) / ended * (jobs - ended))} left"
