"""What is shown of progress: a bar on a terminal, few lines elsewhere."""

import os
import pty
import subprocess
import sys
import time

import pytest

from unbackdoor import _progress

RUN = """
from unbackdoor import _progress
with _progress.bar("tuning", 40) as advance:
    for _ in range(40):
        advance()
"""


def test_a_log_gets_lines_after_twice_as_long_each_time() -> None:
    pace = _progress.Pace(100.0)
    due = [second for second in range(100, 4000) if pace.due(float(second))]
    assert due == [110, 130, 170, 250, 410, 730, 1330, 1930, 2530, 3130, 3730]


def test_a_line_tells_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(_progress, "pace", _progress.Pace(time.monotonic() - 10))
    description = "searching " * 12
    with _progress.bar(description, 3) as advance:
        advance()
        advance()
    assert capsys.readouterr() == ("", f"{description}: 1 of 3 steps\n")


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
