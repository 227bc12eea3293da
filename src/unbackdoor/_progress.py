"""Progress of long work: a bar on a terminal, few lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[], None]

Progress = Callable[[str, int], AbstractContextManager[Advance]]


def nothing() -> None:
    """An advance that shows nothing."""


def silent(description: str, steps: int) -> AbstractContextManager[Advance]:
    """A progress that shows nothing."""
    return nullcontext(nothing)


class Pace:
    """The times at which a log gets a line: after 10 seconds, then each time after two and a half times as long.

    So a run of a few minutes writes a few lines, a run of a night ten.
    """

    def __init__(self, now: float) -> None:
        """Start at a time in seconds, of a clock that never goes back."""
        self.last, self.wait = now, 10.0

    def due(self, now: float) -> bool:
        """Whether a line is due now; if so, the wait for the next one gets longer."""
        if now - self.last < self.wait:
            return False
        self.last, self.wait = now, 2.5 * self.wait
        return True


pace = Pace(time.monotonic())  # of the whole command, or of one of its parts, however many bars it has


def part(progress: Progress, name: str) -> Progress:
    """Begin a part of a command that may take hours: a log gets its first line after 10 seconds again.

    Args:
        progress: of the command.
        name: of the part, which each description begins with.
    """
    global pace
    if progress is not silent:
        pace = Pace(time.monotonic())
    return lambda description, steps: progress(f"{name}: {description}", steps)


@contextmanager
def bar(description: str, steps: int) -> Iterator[Advance]:
    """A progress bar on stderr; if stderr is not a terminal, a line now and then, see `Pace`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = stderr()
    if not is_terminal(console):
        done, start = 0, time.monotonic()

        def count() -> None:
            nonlocal done
            done += 1
            now = time.monotonic()
            if pace.due(now):
                left = f", {duration((now - start) / done * (steps - done))} left" if done < steps else ""
                console.print(f"{description}: {done} of {steps} steps{left}")

        yield count
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as display:
        task = display.add_task(description, total=steps)
        yield lambda: display.advance(task)


def duration(seconds: float) -> str:
    """Returns a time in the largest unit that fits.

    >>> duration(42), duration(200), duration(9000), duration(400_000)
    ('42 s', '3 min', '2.5 h', '4.6 days')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def stderr() -> "Console":
    """Returns the console that shows progress; texts are printed without markup."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def is_terminal(console: "Console") -> bool:
    """Whether stderr is a terminal; rich's `is_terminal` would believe FORCE_COLOR, which is set for many logs."""
    return console.file.isatty()
