"""Ctrl-C, and the signals that end a program: whatever it was writing is removed before it ends.

SIGTERM is what `kill`, `timeout`, batch systems and containers send, SIGHUP comes from a terminal that was closed. By
default both end Python at once, in the middle of a file.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last
SIGNALS: tuple[int, ...] = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_TWICE = 1.0  # seconds: `timeout` sends a signal to its command and then to the whole group, which would strike twice


class _Signals:
    """The signals that were heard, when the last one was, and the one that waits for the end of `held`."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.last = -_TWICE
        self.holding = False
        self.waiting: int | None = None

    def hear(self, number: int, frame: Any = None) -> None:
        """Handle a signal."""
        if self.holding:
            self.waiting = number
        elif time.monotonic() - self.last >= _TWICE:
            self.heard.append(number)
            self.last = time.monotonic()
            raise KeyboardInterrupt


_signals = _Signals()


@contextmanager
def heeded(numbers: tuple[int, ...] = SIGNALS) -> Iterator[list[int]]:
    """Signals raise KeyboardInterrupt while the block runs, unless this process ignores or handles them otherwise.

    Yields:
        the signals that were heard, in order.
    """
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other one may set a handler
        before = {number: handler for number in numbers if (handler := signal.getsignal(number)) in usual}
    _signals.heard, _signals.last = [], -_TWICE
    for number in before:
        signal.signal(number, _signals.hear)
    try:
        yield _signals.heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _signals.heard = []


@contextmanager
def held() -> Iterator[None]:
    """Signals wait until the block ends: a short step that may not be interrupted halfway."""
    outer, _signals.holding = _signals.holding, True
    try:
        yield
    finally:
        _signals.holding = outer
        if _signals.waiting is not None and not outer:
            number, _signals.waiting = _signals.waiting, None
            _signals.hear(number)


def interrupted() -> bool:
    """Whether a signal was heard, even if a library made an error of its own of it."""
    return bool(_signals.heard)


def exit_code() -> int:
    """Returns what a program ends with that a signal ended: 128 and the number of the last one, else that of Ctrl-C."""
    return 128 + (_signals.heard[-1] if _signals.heard else signal.SIGINT)


def cause() -> str:
    """Returns what ended the program, as the beginning of a sentence."""
    if exit_code() == 128 + signal.SIGINT:
        return "Interrupted"
    return f"Ended by {signal.Signals(_signals.heard[-1]).name}"


def end() -> NoReturn:
    """Say so, and exit."""
    with suppress(OSError):  # the terminal may be gone
        print(f"{cause()}; nothing was kept.", file=sys.stderr)
    sys.exit(exit_code())
