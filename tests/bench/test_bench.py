"""The cell store: identity, atomic writes, and what it refuses."""

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
from pydantic import ValidationError

import stores
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


@pytest.mark.parametrize("kind", ["folder", "address"])
def test_a_result_comes_back(kind: str, tmp_path: Path) -> None:
    store = Store(tmp_path if kind == "folder" else f"local://{tmp_path}/runs")
    spec, result = stores.spec(stores.victim()), stores.result(0.9, 0.5)
    assert store.get(spec) is None
    store.put(spec, result)
    assert store.get(spec) == result
    assert store.get({**spec, "seed": 1}) is None
    assert list(store.cells()) == [(spec, result)]
    assert store.done() == {identity(spec)}


def test_a_failure_is_kept_apart_until_it_succeeds(tmp_path: Path) -> None:
    store, spec = Store(tmp_path), stores.spec(stores.victim())
    store.put(spec, stores.failure("no"))
    assert (store.done(), store.failed()) == (set(), {identity(spec)})
    assert store.get(spec) is None
    assert list(store.cells()) == [(spec, stores.failure("no"))]
    store.put(spec, stores.result(0.9, 0.5))
    assert (store.done(), store.failed()) == ({identity(spec)}, set())
    assert list(store.cells()) == [(spec, stores.result(0.9, 0.5))]


def test_a_cell_of_another_form_is_not_written(tmp_path: Path) -> None:
    spec, result = stores.spec(stores.victim()), stores.result(0.9, 0.5)
    for made in ({**result, "score": {}}, {**result, "seconds": "4"}, {**result, "more": 1}):
        with pytest.raises(ValidationError):
            Store(tmp_path).put(spec, made)
    assert list(tmp_path.iterdir()) == []


def test_a_cell_of_another_form_is_read_as_its_key_alone(tmp_path: Path) -> None:
    store, spec = Store(tmp_path), stores.spec(stores.victim())
    odd = {**spec, "seed": 1}
    store.put(spec, stores.result(0.9, 0.5))
    path = tmp_path / "cells" / f"{identity(odd)}.json"
    path.write_text(json.dumps({"version": 1, "spec": odd, "result": {"status": "done", "score": {}}}))
    assert list(store.cells()) == [(spec, stores.result(0.9, 0.5))]
    assert [each for each in store.read_cells() if isinstance(each, str)] == [identity(odd)]
    with pytest.raises(UnbackdoorError) as refusal:
        store.get(odd)
    assert str(refusal.value) == f"{path} is not a file that unbackdoor bench wrote. Remove it to measure it again."


def test_a_copy_of_a_cell_is_not_another_repetition(tmp_path: Path) -> None:
    """Programs that synchronise folders make such copies; means, and their n, counted them."""
    store, spec = Store(tmp_path), stores.spec(stores.victim())
    store.put(spec, stores.result(0.9, 0.5))
    key = identity(spec)
    copy = tmp_path / "cells" / f"{key} (conflicted copy).json"
    copy.write_text((tmp_path / "cells" / f"{key}.json").read_text())
    expected = (
        f"{copy} holds the cell {key}, whose file has that name, so it is a copy, or was changed. Remove it, or put "
        "the original back."
    )
    with pytest.raises(UnbackdoorError) as refusal:
        list(store.cells())
    assert str(refusal.value) == expected
    other = {**spec, "seed": 1}
    copy.rename(tmp_path / "cells" / f"{identity(other)}.json")
    with pytest.raises(UnbackdoorError, match=f"holds the cell {key}, whose file has that name"):
        store.get(other)


def test_rows_are_drawn_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.rows({"n": 2}, lambda: [1, 3]) == [1, 3]
    assert store.rows({"n": 2}, lambda: [0, 2]) == [1, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a file that unbackdoor bench wrote. Remove it to measure it again."),
        ("[]", "is not a file that unbackdoor bench wrote. Remove it to measure it again."),
        ('{"version": 1}', "is not a file that unbackdoor bench wrote. Remove it to measure it again."),
        (
            '{"version": 2, "spec": {}, "result": {}}',
            "has version 2, this one reads 1. Use another store, or update unbackdoor.",
        ),
    ],
)
def test_a_cell_that_is_none(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "cells" / f"{identity({})}.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UnbackdoorError) as refusal:
        Store(tmp_path).get({})
    assert str(refusal.value) == f"{path} {message}"


def test_a_store_of_a_newer_version(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"version": 2}')
    with pytest.raises(UnbackdoorError) as refusal:
        Store(tmp_path)
    assert str(refusal.value) == (
        f"{tmp_path}/store.json has version 2, this one reads 1. Use another store, or update unbackdoor."
    )


def test_a_store_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnbackdoorError, match=r"file is a file, but a store is a folder. Choose another `out`."):
        Store(tmp_path / "file")
    with pytest.raises(UnbackdoorError, match=r"nosuch://x cannot be opened .* Install unbackdoor\[store\], or choose"):
        Store("nosuch://x")
    with pytest.raises(UnbackdoorError, match=r"`out` must be a folder or an address, got an empty name\."):
        Store("")


def _fill(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_bytes(b"weights")
    (folder / "attack.json").write_text("{}")


@pytest.mark.parametrize("kind", ["folder", "address"])
def test_a_victim_comes_back_with_all_its_files(kind: str, tmp_path: Path) -> None:
    store = Store(tmp_path if kind == "folder" else f"local://{tmp_path}/runs")
    store.put_victim({"seed": 0}, _fill)
    assert store.victims() == {identity({"seed": 0})}
    folder = store.victim(identity({"seed": 0}))
    assert (folder / "model" / "weights").read_bytes() == b"weights"
    assert json.loads((folder / "files.json").read_text())["spec"] == {"seed": 0}


@pytest.mark.parametrize("change", ["changed", "removed", "added"])
def test_a_victim_whose_files_were_changed(change: str, tmp_path: Path) -> None:
    store, key = Store(tmp_path), identity({"seed": 0})
    store.put_victim({"seed": 0}, _fill)
    folder = tmp_path / "victims" / key
    file = folder / "model" / ("more" if change == "added" else "weights")
    if change == "removed":
        file.unlink()
    else:
        file.write_text("others")
    with pytest.raises(UnbackdoorError) as refusal:
        store.victim(key)
    assert str(refusal.value) == (
        f"{file} was changed, added or removed after this victim was trained. Put it back, or remove {folder} to train "
        "the victim again."
    )
    (folder / "files.json").unlink()
    with pytest.raises(
        UnbackdoorError, match=r"is not a victim that unbackdoor bench wrote. Remove it to train it again."
    ):
        store.victim(key)
    with pytest.raises(UnbackdoorError, match=r"is not there. Start the grid again to train it again."):
        store.victim("gone")


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    one, two = Store(tmp_path), Store(tmp_path)
    with one.locked("cells/a") as mine:
        assert mine
        with two.locked("cells/a") as theirs:
            assert not theirs
        with two.locked("cells/b") as other:
            assert other
    with two.locked("cells/a", wait=True) as theirs:
        assert theirs
    assert list((tmp_path / "locks").iterdir()) == []


WRITER = """
import json
import sys
from unbackdoor._bench import Store
store, spec, result = Store(sys.argv[1]), *map(json.loads, sys.argv[2:])
number = 0
while True:
    with store.locked(f"cells/{number % 3}", wait=True):
        store.put({**spec, "seed": number}, result)
    number += 1
    if number == 1:
        print("ready", flush=True)
"""


def test_killing_the_writer_leaves_whole_cells(tmp_path: Path) -> None:
    random.seed(0)
    result = stores.result(0.9, notes=["x" * 20_000])
    made = [json.dumps(part) for part in (stores.spec(stores.victim()), result)]
    for _ in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), *made], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(random.uniform(0, 0.05))
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
    cells = list(Store(tmp_path).cells())
    assert cells
    assert all(kept == result for _, kept in cells)
    assert all(json.loads(path.read_text()) for path in tmp_path.glob("cells/*.json"))
    for number in range(3):  # the locks of the dead are free
        with Store(tmp_path).locked(f"cells/{number}") as held:
            assert held


def test_rows_that_were_not_drawn_here_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.rows({"seed": 0}, lambda: [2, 0]) == [2, 0]
    file = tmp_path / "rows" / f"{identity({'seed': 0})}.json"
    file.write_text('{"version": 1, "spec": {}, "rows": [-1]}')
    with pytest.raises(UnbackdoorError) as refusal:
        store.rows({"seed": 0}, lambda: [2, 0])
    assert str(refusal.value) == f"{file} is not a file that unbackdoor bench wrote. Remove it to measure it again."
