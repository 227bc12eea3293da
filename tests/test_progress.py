"""The display of progress: a bar on a terminal, few lines elsewhere."""

import os
import pty
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from unbackdoor import _progress
from unbackdoor._bench.progress import Progress

RUN = """
from unbackdoor import _progress
with _progress.bar("tuning", 40) as advance:
    for _ in range(40):
        advance()
"""


def test_a_log_gets_lines_after_ever_longer_waits() -> None:
    pace = _progress.Pace(100.0)
    due = [second / 2 for second in range(200, 8000) if pace.due(second / 2)]
    assert due == [110, 135, 197.5, 354, 745, 1722]  # waits of 10, 25, 62.5, 156.25, ..., on the next half second


def test_a_night_leaves_at_most_ten_lines() -> None:
    pace = _progress.Pace(0.0)
    assert sum(pace.due(float(second)) for second in range(12 * 3600)) <= 10


def test_a_line_says_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    times = iter([100.0, 140.0, 150.0])
    monkeypatch.setattr(_progress, "time", SimpleNamespace(monotonic=lambda: next(times)))
    monkeypatch.setattr(_progress, "pace", _progress.Pace(100.0))
    description = "searching " * 12
    with _progress.bar(description, 4) as advance:
        advance()
        advance()
    assert capsys.readouterr() == ("", f"{description}: 1 of 4 steps, 2 min left\n")


def test_each_part_of_a_long_command_has_a_line_after_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first detectors of an audit had used up the lines: a later one said nothing for an hour."""
    now = 0.0
    monkeypatch.setattr(_progress, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(_progress, "pace", _progress.Pace(-100_000.0))
    for name in ("patch (1 of 2)", "warp (2 of 2)"):
        _progress.pace.wait = 1e6  # as after a night
        with _progress.part(_progress.bar, name)("inverting triggers", 4) as advance:
            now += 12
            advance()
    assert capsys.readouterr().err.splitlines() == [
        "patch (1 of 2): inverting triggers: 1 of 4 steps, 36 s left",
        "warp (2 of 2): inverting triggers: 1 of 4 steps, 36 s left",
    ]
    before = _progress.pace
    _progress.part(_progress.silent, "margin")
    assert _progress.pace is before  # one that shows nothing changes nothing for others


def test_a_short_run_leaves_nothing_in_a_log() -> None:
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_terminal_gets_a_bar() -> None:
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", RUN],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        check=True,
        env={**os.environ, "TERM": "xterm"},
    )
    assert b"tuning" in os.read(ours, 65536)
    os.close(ours)
    os.close(theirs)


def test_a_grid_leaves_few_lines_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "pace", _progress.Pace(time.monotonic() - 10))
    progress = Progress(1, 50, 0)
    with progress.shown():
        progress.started()
        progress.ended("victim", cell=False)
        for cell in range(50):
            progress.started()
            progress.ended(f"cell {cell}", cell=True, problem="too [bold]large" if cell % 2 else "")
    assert capsys.readouterr().err.splitlines() == [
        "victims 1 of 1, cells 0 of 50 done, 0 failed, 0 running, 0 s left",
        *(f"failed: cell {cell}: too [bold]large" for cell in (1, 3, 5)),
    ]
    assert (progress.measured, progress.failed) == (50, 25)
