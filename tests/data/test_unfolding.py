"""Files whose rows take far more memory than they have bytes: refused before that memory is taken."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from unbackdoor import UnbackdoorError
from unbackdoor._data.reading import opened

ROWS = 1_000_000
ZEROS = np.zeros(ROWS, dtype=np.int32)


def written(table: Any, path: Path, **options: Any) -> Path:
    if path.suffix == ".arrow":
        with ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        parquet.write_table(table, path, **options)
    return path


def repeated(entry: Any) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array(ZEROS), [entry])


TEXT = {"text": repeated("x" * 900_000), "label": pa.array(ZEROS)}
PICTURES = {
    "image": pa.StructArray.from_arrays([repeated(b"x" * 900_000), repeated("p.png")], ["bytes", "path"]),
    "label": pa.array(ZEROS),
}


@pytest.mark.parametrize(
    ("name", "columns", "options"),
    [
        ("dictionary.parquet", TEXT, {}),
        ("plain.parquet", TEXT, {"store_schema": False}),
        ("pictures.parquet", PICTURES, {}),
        ("runs.parquet", {"label": pa.array(np.zeros(20 * ROWS, dtype=np.int64))}, {}),
        ("dictionary.arrow", TEXT, {}),
    ],
)
def test_what_unfolds_to_far_more_is_refused(name: str, columns: Any, options: Any, tmp_path: Path) -> None:
    path = written(pa.table(columns), tmp_path / name, **options)
    length = path.stat().st_size
    with pytest.raises(UnbackdoorError) as caught:
        opened(path, name, label="label", classes=None)
    assert str(caught.value) == (
        f"{path} has {length:,} bytes, but its rows take more than {max(2**28, 100 * length):,} in memory. Nothing of "
        "its kind is repeated as often; check what it is."
    )


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_words_that_are_repeated_as_often_as_labels_are_are_read(name: str, tmp_path: Path) -> None:
    labels = pa.DictionaryArray.from_arrays(np.arange(200_000) % 2, ["good", "bad"])
    texts = pa.array([f"film {row}" for row in range(200_000)])
    path = written(pa.table({"text": texts, "label": labels}), tmp_path / name)
    (table,) = opened(path, name, label="label", classes=None)
    assert table.column("label")[:3] == ["good", "bad", "good"]
    assert table.column("text")[-1] == "film 199999"


def test_a_column_of_lists_or_of_numbers_in_a_dictionary_is_read(tmp_path: Path) -> None:
    numbers = pa.DictionaryArray.from_arrays(np.arange(10) % 2, pa.array([5, 7]))
    columns = {"label": numbers, "tokens": pa.array([["a", "b"]] * 10), "facts": pa.array([{"x": 1}] * 10)}
    (table,) = opened(written(pa.table(columns), tmp_path / "d.parquet"), "d", label="label", classes=None)
    assert table.column("label") == [5, 7] * 5
