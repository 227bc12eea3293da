"""The cell store: identity, atomic writes, and a process that is killed at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbackdoor import UnbackdoorError
from unbackdoor._bench import Store, identity

SCALARS = (
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)


@given(st.dictionaries(st.text(min_size=1), SCALARS, max_size=5))
def test_the_identity_does_not_depend_on_the_order(spec: dict) -> None:
    assert identity(spec) == identity(dict(reversed(spec.items())))


def test_the_identity_is_the_hash_of_the_canonical_text() -> None:
    import hashlib

    assert identity({"b": 1, "a": "x"}) == hashlib.sha256(b'{"a":"x","b":1,"version":1}').hexdigest()[:16]


def test_a_result_comes_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "cells")
    spec = {"method": "fst", "seed": 0}
    assert store.get(spec) is None
    store.put(spec, {"value": 0.5})
    assert store.get(spec) == {"value": 0.5}
    assert store.get({**spec, "seed": 1}) is None
    assert list(store.cells()) == [(spec, {"value": 0.5})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no cell that unbackdoor wrote. Remove it to measure it again."),
        ("[]", "is no cell that unbackdoor wrote. Remove it to measure it again."),
        ('{"version": 2, "spec": {}, "result": {}}', "has version 2, this one reads 1. Use another store."),
    ],
)
def test_a_cell_that_is_none(text: str, message: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.path({}).write_text(text)
    with pytest.raises(UnbackdoorError) as refusal:
        store.get({})
    assert str(refusal.value) == f"{store.path({})} {message}"


WRITER = """
import sys
from pathlib import Path
from unbackdoor._bench import Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
number = 0
while True:
    store.put({"number": number}, {"payload": "x" * 20_000})
    number += 1
"""


def test_killing_the_writer_leaves_whole_cells(tmp_path: Path) -> None:
    random.seed(0)
    for _ in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(random.uniform(0, 0.05))
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
    cells = list(Store(tmp_path).cells())
    assert len(cells) > 1
    assert all(result == {"payload": "x" * 20_000} for _, result in cells)
    assert all(json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
