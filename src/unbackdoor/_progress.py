"""Progress of long work: a bar on a terminal, few lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Advance = Callable[[], None]


Progress = Callable[[str, int], AbstractContextManager[Advance]]


def silent(description: str, steps: int) -> AbstractContextManager[Advance]:
    """A progress that shows nothing."""
    return nullcontext(lambda: None)


class Pace:
    """When a log gets another line: after 10 seconds, then after twice as long each time, at most 10 minutes.

    So a run of a few minutes leaves a few lines, and one of a night does not seem dead.
    """

    def __init__(self, now: float) -> None:
        """Start at a time in seconds, of a clock that never goes back."""
        self.last, self.wait = now, 10.0

    def due(self, now: float) -> bool:
        """Whether a line is due now; if so, the next one is waited for longer."""
        if now - self.last < self.wait:
            return False
        self.last, self.wait = now, min(2 * self.wait, 600.0)
        return True


pace = Pace(time.monotonic())


@contextmanager
def bar(description: str, steps: int) -> Iterator[Advance]:
    """A progress bar on stderr; where stderr is no terminal, a line now and then, see `Pace`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.file.isatty():  # `is_terminal` would believe FORCE_COLOR, which is set for many logs
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            if pace.due(time.monotonic()):
                console.print(f"{description}: {done} of {steps} steps", highlight=False, soft_wrap=True)

        yield count
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as display:
        task = display.add_task(description, total=steps)
        yield lambda: display.advance(task)
