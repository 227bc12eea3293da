"""The entries of a record about the process."""

import subprocess
import sys

from unbackdoor._artifacts.machine import peak_memory

MIB = 2**20


def test_the_peak_is_that_of_the_most_that_was_held() -> None:
    held = bytearray(200 * MIB)
    del held
    assert 200 * MIB < peak_memory() < 100_000 * MIB


def test_a_small_process_does_not_inherit_the_peak_of_a_large_parent() -> None:
    held = bytearray(400 * MIB)
    code = "from unbackdoor._artifacts.machine import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5 * MIB < int(done.stdout) < len(held) / 2
