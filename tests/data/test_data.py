"""Reading data of every kind, splitting it, and handing it out in batches."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unbackdoor import Dataset, ImageEncoder, UnbackdoorError, load
from unbackdoor._data.augmentation import Augmentation
from unbackdoor._data.classes import check_labels
from unbackdoor._data.splits import stratified

NAMES = ["cat", "dog", "eel"]
LABELS = [0, 2, 1, 2]

datasets.disable_progress_bars()


def picture(row: int, channels: int = 3, size: int = 6) -> np.ndarray:
    """Pixels that differ in every row, so that a mix-up of rows is seen."""
    shape = (size, size, 3) if channels == 3 else (size, size)
    return np.random.default_rng(row).integers(0, 256, shape, dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


PICTURES = [picture(row) for row in range(4)]
PIXELS = torch.from_numpy(np.stack(PICTURES)).permute(0, 3, 1, 2)
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
TABLE = datasets.Dataset.from_dict({"image": [Image.fromarray(part) for part in PICTURES], "label": LABELS}, FEATURES)


def assert_read(data: Dataset, classes: tuple[str, ...] | None = tuple(NAMES)) -> None:
    assert data.items.dtype == torch.uint8
    assert torch.equal(data.items, PIXELS)
    assert data.labels.dtype == torch.int64
    assert data.labels.tolist() == LABELS
    assert data.classes == classes


def write_table(path: Path, labels: object, column: str = "label", pictures: object = None) -> Path:
    """A parquet file without the metadata of `datasets`."""
    pictures = [{"bytes": encoded(part), "path": None} for part in PICTURES] if pictures is None else pictures
    pyarrow.parquet.write_table(pa.table({"image": pictures, column: labels}), path)
    return path


def refusal(*args: object, **options: object) -> str:
    with pytest.raises(UnbackdoorError) as caught:
        Dataset.load(*args, **options)
    return str(caught.value)


# Kinds of data.


@pytest.mark.parametrize(("source", "came"), [(None, "None"), ([], "[]"), (3, "3"), ([None], "[None]")])
def test_what_is_no_path(source: object, came: str) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        Dataset.load(source)
    assert str(caught.value) == f"The data must be a path, or several in a list, got {came}."
    with pytest.raises(UnbackdoorError) as caught:
        load(source)
    assert str(caught.value) == f"`source` must be a path or a Hub name, got {type(source).__name__}."


def test_parquet_with_image_and_class_features(tmp_path: Path) -> None:
    TABLE.to_parquet(tmp_path / "data.parquet")
    data = Dataset.load(tmp_path / "data.parquet")
    assert_read(data)
    assert data.name == str(tmp_path / "data.parquet")
    assert data.shape == (3, 6, 6)
    assert len(data) == 4


def test_plain_parquet_of_structs_and_of_bytes(tmp_path: Path) -> None:
    assert_read(Dataset.load(write_table(tmp_path / "structs.parquet", LABELS)), None)
    raw = write_table(tmp_path / "bytes.parquet", LABELS, pictures=[encoded(part) for part in PICTURES])
    assert_read(Dataset.load(raw), None)


def test_parquet_of_numbers_as_pictures(tmp_path: Path) -> None:
    path = write_table(tmp_path / "numbers.parquet", LABELS, pictures=[part.tolist() for part in PICTURES])
    assert_read(Dataset.load(path), None)


def test_several_files_a_pattern_and_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in range(2):
        TABLE.select([2 * part, 2 * part + 1]).to_parquet(folder / f"train-{part}.parquet")
    assert_read(Dataset.load([folder / "train-0.parquet", folder / "train-1.parquet"]))
    assert_read(Dataset.load(folder / "train-*.parquet"))
    assert_read(Dataset.load(str(tmp_path / "*" / "train-[01].parquet")))
    assert_read(Dataset.load(folder))
    swapped = Dataset.load([folder / "train-1.parquet", folder / "train-0.parquet"])
    assert swapped.labels.tolist() == [1, 2, 0, 2]
    assert swapped.name == f"{folder}/train-1.parquet, {folder}/train-0.parquet"


def test_folders_with_several_splits_are_refused(tmp_path: Path) -> None:
    for name in ("train-00000", "train-00001", "test"):
        TABLE.to_parquet(tmp_path / f"{name}.parquet")
    assert refusal(tmp_path) == (
        f"{tmp_path} holds splits (test, train), but only one is read. Name it, as in {tmp_path}/train*.parquet."
    )
    pictures = tmp_path / "pictures"
    for split in ("train", "val"):
        (pictures / split / "cat").mkdir(parents=True)
        (pictures / split / "cat" / "a.png").write_bytes(encoded(PICTURES[0]))
    assert refusal(pictures) == (
        f"{pictures} holds splits (train, val), but only one is read. Name it, as in {pictures}/val."
    )
    assert len(Dataset.load(pictures / "val")) == 1


def test_image_folder_with_nested_folders_and_odd_files(tmp_path: Path) -> None:
    for row, label in enumerate(LABELS):
        folder = tmp_path / NAMES[label] / ("nested" if row == 3 else "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row}.png").write_bytes(encoded(PICTURES[row]))
    (tmp_path / "readme.txt").write_text("hello")
    (tmp_path / "cat" / "Thumbs.db").write_text("no picture")
    (tmp_path / "cat" / "notes.pdf").write_text("no picture")
    (tmp_path / "cat" / "._0.png").write_text("no picture")
    (tmp_path / ".cache").mkdir()
    data = Dataset.load(tmp_path)
    assert data.classes == tuple(NAMES)
    assert data.labels.tolist() == [0, 1, 2, 2]
    assert torch.equal(data.items, PIXELS[[0, 2, 1, 3]])


def test_folders_named_by_numbers_are_class_indices_even_where_some_are_absent(tmp_path: Path) -> None:
    for label in (0, 2, 10):
        (tmp_path / str(label)).mkdir()
        (tmp_path / str(label) / "a.png").write_bytes(encoded(PICTURES[0]))
    data = Dataset.load(tmp_path)
    assert data.labels.tolist() == [0, 2, 10]  # not 0, 1, 2, nor 0, 10, 2 as text sorts
    assert data.classes == tuple(map(str, range(11)))
    named = Dataset.load(tmp_path, classes=[f"class {number}" for number in range(11)])
    assert named.labels.tolist() == [0, 2, 10]
    assert named.classes is not None
    assert named.classes[2] == "class 2"


def test_image_folder_without_classes_or_pictures(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path} has no sub-folders; an image folder has one per class, with its pictures."
    )
    (tmp_path / "cat").mkdir()
    assert refusal(tmp_path) == f"{tmp_path} has no rows; at least one labelled example is needed."


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_paths_relative_to_the_file(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    rows = []
    for row, label in enumerate(LABELS):
        path = tmp_path / "pictures" / f"{row}.png"
        path.write_bytes(encoded(PICTURES[row]))
        rows.append({"image": str(path) if row == 1 else f"pictures/{row}.png", "label": NAMES[label]})
    file = tmp_path / f"data.{kind}"
    if kind == "csv":
        file.write_text("image,label\n" + "".join(f"{row['image']},{row['label']}\n" for row in rows))
    else:
        file.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    assert_read(Dataset.load(file))
    monkeypatch.chdir(tmp_path.parent)
    assert_read(Dataset.load(Path(tmp_path.name) / file.name))


def test_files_with_paths_in_two_folders(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.csv").write_text("image,label\n1.png,0\n")
    assert refusal([tmp_path / "a" / "data.csv", tmp_path / "b" / "data.csv"]) == (
        f"{tmp_path}/a/data.csv and {tmp_path}/b/data.csv are in two folders, but pictures are found relative to one. "
        "Join them."
    )


def test_saved_data_sets(tmp_path: Path) -> None:
    TABLE.save_to_disk(str(tmp_path / "saved"))
    assert_read(Dataset.load(tmp_path / "saved"))
    datasets.DatasetDict({"train": TABLE, "test": TABLE}).save_to_disk(str(tmp_path / "dict"))
    assert refusal(tmp_path / "dict") == (
        f"{tmp_path}/dict holds splits (test, train), but only one is read. Name it, as in {tmp_path}/dict/train."
    )
    assert_read(Dataset.load(tmp_path / "dict" / "train"))


def test_columns_of_other_names(tmp_path: Path) -> None:
    TABLE.rename_columns({"image": "img", "label": "fine"}).to_parquet(tmp_path / "d.parquet")
    assert_read(Dataset.load(tmp_path / "d.parquet", columns={"image": "img", "label": "fine"}))
    assert refusal(tmp_path / "d.parquet") == (
        f"{tmp_path}/d.parquet has no column 'image'; it has img, fine. Name it by `columns={{'image': 'NAME'}}`."
    )
    assert refusal(tmp_path / "d.parquet", columns={"image": "img"}, group="track") == (
        f"{tmp_path}/d.parquet has no column 'label'; it has img, fine. Name it by `columns={{'label': 'NAME'}}`."
    )
    assert refusal(tmp_path / "d.parquet", columns={"image": "img", "label": "fine"}, group="track") == (
        f"{tmp_path}/d.parquet has no column 'track'; it has img, fine. Name it by `group='NAME'`."
    )
    assert refusal(tmp_path / "d.parquet", columns={"picture": "img"}) == (
        "`columns` must name image or label, got picture. Leave that one out."
    )


def test_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text,label\nhello,0\n")
    assert refusal(tmp_path / "d.csv") == (
        f"{tmp_path}/d.csv holds text (text, label), but images are needed. Take a data set with pictures, "
        "or a model for text (attack: `base`)."
    )


def test_the_real_data_is_read_as_datasets_decodes_it(shared_data: Path) -> None:
    path = shared_data / "vision" / "gtsrb" / "test.parquet"
    data = Dataset.load(path)
    assert data.shape == (3, 32, 32)
    assert len(data) == 5001
    assert len(data.classes or ()) == 43
    table = pyarrow.parquet.read_table(path)
    assert data.labels.tolist() == table["label"].to_pylist()
    for row in (0, 77, 5000):
        image = Image.open(io.BytesIO(table["image"][row].as_py()["bytes"]))
        assert np.array_equal(data.items[row].permute(1, 2, 0).numpy(), np.asarray(image))


# Data that cannot be used.


def test_missing_unknown_and_broken_files(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.parquet") == (
        f"{tmp_path}/no.parquet does not exist; data is a file or a folder with labelled examples."
    )
    assert refusal(tmp_path / "no-*.parquet").startswith(f"{tmp_path}/no-*.parquet does not exist;")
    (tmp_path / "d.docx").write_text("")
    assert refusal(tmp_path / "d.docx") == (
        f"{tmp_path}/d.docx is of an unknown kind; data is .parquet, .csv, .tsv, .json, .jsonl, .arrow, an image "
        "folder or a saved data set. Save it as one of these."
    )
    for name in ("d.parquet", "d.jsonl"):
        (tmp_path / name).write_text("{ no such format")
        message = refusal(tmp_path / name)
        assert message.startswith(f"{tmp_path}/{name} cannot be read (")
        assert message.endswith("). Repair it, or take other data.")
        assert "\n" not in message


def test_kinds_that_do_not_join(tmp_path: Path) -> None:
    TABLE.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("image,label\n")
    assert refusal([tmp_path / "a.parquet", tmp_path / "b.csv"]) == (
        "Files that are joined must be of one kind, got .csv, .parquet."
    )
    (tmp_path / "folder").mkdir()
    assert refusal([tmp_path / "a.parquet", tmp_path / "folder"]) == (
        f"{tmp_path}/a.parquet, {tmp_path}/folder has a folder among several parts; data is one folder, or files."
    )


def test_no_rows(tmp_path: Path) -> None:
    TABLE.select([]).to_parquet(tmp_path / "d.parquet")
    assert refusal(tmp_path / "d.parquet") == (
        f"{tmp_path}/d.parquet has no rows; at least one labelled example is needed."
    )
    pyarrow.parquet.write_table(TABLE.data.table.slice(0, 0), tmp_path / "d.parquet")  # with a row group of no rows
    assert refusal(tmp_path / "d.parquet").startswith(f"{tmp_path}/d.parquet has no rows;")
    (tmp_path / "d.csv").write_text("image,label\n")
    assert refusal(tmp_path / "d.csv") == f"{tmp_path}/d.csv has no rows; at least one labelled example is needed."


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ({"bytes": encoded(PICTURES[0])[:60], "path": None}, "cannot be decoded ("),
        ({"bytes": b"hello", "path": None}, "cannot be decoded (cannot identify image file)"),
        ({"bytes": b"", "path": None}, "cannot be decoded (cannot identify image file)"),
    ],
)
def test_a_corrupt_picture_is_named_by_its_row(tmp_path: Path, cell: dict, reason: str) -> None:
    pictures = [{"bytes": encoded(part), "path": None} for part in PICTURES]
    path = write_table(tmp_path / "d.parquet", LABELS, pictures=[*pictures[:2], cell, pictures[3]])
    message = refusal(path)
    assert message.startswith(f"{path} has a picture in row 2 that {reason}")
    assert message.endswith("). Repair or remove that row.")


def test_an_absent_picture_is_named_by_its_row(tmp_path: Path) -> None:
    raw = [encoded(part) for part in PICTURES]
    path = write_table(tmp_path / "d.parquet", LABELS, pictures=[*raw[:3], None])
    assert refusal(path) == f"{path} has no picture in row 3. Repair or remove that row."


# Labels and class names.


@pytest.mark.parametrize("labels", [LABELS, [str(label) for label in LABELS], pa.array(LABELS, pa.uint8())])
def test_labels_as_numbers_in_any_type(tmp_path: Path, labels: object) -> None:
    assert_read(Dataset.load(write_table(tmp_path / "d.parquet", labels)), None)


def test_labels_as_names(tmp_path: Path) -> None:
    path = write_table(tmp_path / "d.parquet", [NAMES[label] for label in LABELS])
    assert_read(Dataset.load(path))


def test_numbers_as_names_are_matched_to_the_model(tmp_path: Path) -> None:
    path = write_table(tmp_path / "d.parquet", ["10", "30", "20", "30"])
    assert Dataset.load(path, classes=["30", "20", "10"]).labels.tolist() == [2, 0, 1, 0]


def test_classes_in_another_order_are_matched_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "unbackdoor")
    TABLE.to_parquet(tmp_path / "d.parquet")
    data = Dataset.load(tmp_path / "d.parquet", classes=["eel", "ant", "dog", "cat"])
    assert data.labels.tolist() == [3, 0, 2, 0]
    assert data.classes == ("eel", "ant", "dog", "cat")
    assert caplog.messages == [
        f"{tmp_path}/d.parquet: labels were matched to the model's classes by name: cat = 3, eel = 0, dog = 2."
    ]
    strings = write_table(tmp_path / "s.parquet", [NAMES[label] for label in LABELS])
    assert Dataset.load(strings, classes=["eel", "ant", "dog", "cat"]).labels.tolist() == [3, 0, 2, 0]
    assert len(caplog.messages) == 1


def test_classes_that_contradict_the_model(tmp_path: Path) -> None:
    TABLE.to_parquet(tmp_path / "d.parquet")
    expected = (
        f"{tmp_path}/d.parquet has the class 'eel', which the model does not know; its classes are cat, dog, fox. "
        "Rename the classes, or take other data."
    )
    assert refusal(tmp_path / "d.parquet", classes=["cat", "dog", "fox"]) == expected
    strings = write_table(tmp_path / "d.parquet", [NAMES[label] for label in LABELS])
    assert refusal(strings, classes=["cat", "dog", "fox"]) == expected


def test_two_classes_of_one_name(tmp_path: Path) -> None:
    TABLE.to_parquet(tmp_path / "d.parquet")
    assert refusal(tmp_path / "d.parquet", classes=["cat", "dog", "eel", "dog"]) == (
        f"{tmp_path}/d.parquet has its classes in another order than the model, which has two of one name. Give labels "
        "as the model's numbers."
    )


def test_labels_outside_the_classes(tmp_path: Path) -> None:
    path = write_table(tmp_path / "d.parquet", [0, 1, 3, 2])
    assert refusal(path, classes=NAMES) == (
        f"{path} has label 3 in row 2, but the model has 3 classes (0 to 2). Correct the label, or take other data."
    )
    write_table(path, [0, 1, 2, -1])
    assert refusal(path) == (
        f"{path} has label -1 in row 3, but labels count from 0. Correct the label, or take other data."
    )
    named = pa.table({"image": [encoded(part) for part in PICTURES], "label": [0, 1, 2, 5]})
    metadata = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}}}
    pyarrow.parquet.write_table(named.replace_schema_metadata({"huggingface": json.dumps(metadata)}), path)
    assert "has label 5 in row 3, but it names 3 classes (0 to 2)." in refusal(path)
    assert "has label 5 in row 3, but it names 3 classes (0 to 2)." in refusal(path, classes=["dog", "cat", "eel"])


@pytest.mark.parametrize(
    ("labels", "shown", "row"),
    [
        ([0.0, 1.5, 1.0, 2.0], "1.5", 1),
        ([0.0, 1e300, 1.0, 2.0], "1e+300", 1),
        ([0.0, float("inf"), 1.0, 2.0], "inf", 1),
        ([[0], [1], [0, 1], [2]], "[0]", 0),
        ([b"a"] * 4, "b'a'", 0),
    ],
)
def test_labels_that_are_no_classes(tmp_path: Path, labels: list, shown: str, row: int) -> None:
    path = write_table(tmp_path / "d.parquet", labels)
    assert refusal(path) == (
        f"{path} has the label {shown} in row {row}; labels must be whole numbers or class names "
        "(several labels or a number to predict are not supported)."
    )


def test_a_missing_label(tmp_path: Path) -> None:
    path = write_table(tmp_path / "d.parquet", [0, None, 1, 2])
    assert refusal(path) == f"{path} has no label in row 1; every row needs one."


def test_a_label_that_the_head_lacks_is_named_by_its_row_in_the_file(tmp_path: Path) -> None:
    data = Dataset.load(write_table(tmp_path / "d.parquet", [0, 1, 4, 2]))
    check_labels(data, 5)
    with pytest.raises(UnbackdoorError) as caught:
        check_labels(data.select([3, 2]).select([1]), 4)
    assert str(caught.value) == (
        f"{tmp_path}/d.parquet has label 4 in row 2, but the model has 4 classes (0 to 3). Correct the label, or take "
        "other data."
    )


# Side effects.


def test_reading_leaves_no_cache_and_no_noise(tmp_path: Path) -> None:
    TABLE.to_parquet(tmp_path / "d.parquet")
    TABLE.save_to_disk(str(tmp_path / "saved"))
    for label, name in enumerate(NAMES):
        (tmp_path / "folder" / name).mkdir(parents=True)
        (tmp_path / "folder" / name / "a.png").write_bytes(encoded(PICTURES[label]))
    (tmp_path / "d.csv").write_text("image,label\nfolder/cat/a.png,0\n")
    (tmp_path / "home").mkdir()
    (tmp_path / "cwd").mkdir()
    before = sorted(tmp_path.rglob("*"))
    program = (
        "import sys; from unbackdoor import Dataset\n"
        "for name in ('d.parquet', 'saved', 'folder', 'd.csv'): Dataset.load('../' + name)\n"
        "import datasets; print(datasets.is_progress_bar_enabled())"
    )
    environment = {key: given for key, given in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": str(tmp_path / "home"), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(tmp_path / "cwd")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "cwd", env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
    assert sorted(tmp_path.rglob("*")) == before


def test_progress_bars_come_back_after_a_failure(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_text("no parquet")
    datasets.enable_progress_bars()
    try:
        refusal(tmp_path / "d.parquet")
        assert datasets.is_progress_bar_enabled()
    finally:
        datasets.disable_progress_bars()


# Splits.


def made(labels: list[int], groups: list[int] | None = None) -> Dataset:
    """Examples whose only pixel is their row number."""
    return Dataset(
        items=torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1),
        labels=torch.tensor(labels),
        encode=ImageEncoder(scale=1.0),
        groups=None if groups is None else torch.tensor(groups),
    )


def test_a_split_by_hand() -> None:
    # 6, 3 and 1 examples; shares of 4 are 2.4, 1.2 and 0.4: whole parts 2, 1, 0, and one more to the largest rest,
    # where 0.4 and 0.4 tie and the first class wins.
    part, rest = made([0] * 6 + [1] * 3 + [2]).split(4, seed=0)
    assert torch.bincount(part.labels, minlength=3).tolist() == [3, 1, 0]
    assert torch.bincount(rest.labels, minlength=3).tolist() == [3, 2, 1]


@given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=120), data=st.data(), seed=st.integers(0, 1000))
def test_splits_are_exact_disjoint_complete_stratified_and_seeded(
    labels: list[int], data: st.DataObject, seed: int
) -> None:
    count = data.draw(st.integers(1, len(labels) - 1))
    whole = made(labels)
    part, rest = whole.split(count, seed=seed)
    rows, others = part.items.flatten().tolist(), rest.items.flatten().tolist()
    assert len(rows) == count
    assert sorted(rows + others) == list(range(len(labels)))
    assert rows == sorted(rows)
    assert part.labels.tolist() == [labels[row] for row in rows]
    assert part.rows is not None
    assert part.rows.tolist() == rows
    for label in set(labels):
        exact = labels.count(label) * count / len(labels)
        assert abs(part.labels.tolist().count(label) - exact) < 1
    assert whole.split(count, seed=seed)[0].items.flatten().tolist() == rows


def test_another_seed_draws_others() -> None:
    draws = {tuple(stratified(torch.zeros(100, dtype=torch.int64), 10, seed=seed)) for seed in range(5)}
    assert len(draws) == 5


@given(pairs=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), min_size=2, max_size=80), seed=st.integers(0, 9))
def test_groups_are_never_torn_and_never_leave_a_class_out(pairs: list[tuple[int, int]], seed: int) -> None:
    labels = [label for label, _ in pairs]
    if all(len({group for other, group in pairs if other == label}) == 1 for label in labels):
        with pytest.raises(UnbackdoorError) as caught:
            made(labels, [group for _, group in pairs]).split(1, seed=seed)
        assert str(caught.value) == (
            "`group` puts each class into one group, so none can be held out. Give `test` instead."
        )
        return
    whole = made(labels, [group for _, group in pairs])
    try:
        part, rest = whole.split(max(1, len(pairs) // 3), seed=seed)
    except UnbackdoorError:  # the share of each class with two groups was nothing
        return
    held = {pairs[row] for row in part.items.flatten().tolist()}
    kept = {pairs[row] for row in rest.items.flatten().tolist()}
    assert not held & kept
    assert held | kept == set(pairs)
    assert set(rest.labels.tolist()) == set(labels)


def test_the_group_column_counts_within_a_class(tmp_path: Path) -> None:
    table = TABLE.add_column("track", [7, 7, 7, 8])
    table.to_parquet(tmp_path / "d.parquet")
    groups = Dataset.load(tmp_path / "d.parquet", group="track").groups
    assert groups is not None
    assert len(set(groups.tolist())) == 4  # (cat, 7), (eel, 7), (dog, 7), (eel, 8)


@pytest.mark.parametrize("count", [0, 4, -1])
def test_a_part_must_be_a_part(count: int) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        made([0, 0, 1, 1]).split(count, seed=0)
    assert str(caught.value) == f"A part of the data must hold 1 to 3 of 4 examples, got {count}. Take more data."
    with pytest.raises(UnbackdoorError, match="must hold part of 2 or more, got 1"):
        made([0]).split(1, seed=0)


# Batches.


def rows_of(data: Dataset, size: int, seed: int | None) -> list[list[int]]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batches = list(data.batches(size, generator=generator))
    for batch in batches:
        assert batch.labels.tolist() == [int(row) % 7 for row in batch.inputs.flatten()]
    return [batch.inputs.flatten().int().tolist() for batch in batches]


@given(count=st.integers(1, 60), size=st.integers(2, 20), seed=st.integers(0, 100))
def test_batches_hold_every_example_once(count: int, size: int, seed: int) -> None:
    data = made([row % 7 for row in range(count)])
    plain = rows_of(data, size, None)
    assert [row for batch in plain for row in batch] == list(range(count))
    assert all(len(batch) == size for batch in plain[:-1])
    shuffled = rows_of(data, size, seed)
    assert sorted(row for batch in shuffled for row in batch) == list(range(count))
    assert shuffled == rows_of(data, size, seed)
    assert len(shuffled) == 1 or min(map(len, shuffled)) > 1
    assert max(map(len, shuffled)) <= size + 1


def test_a_last_batch_of_one_joins_the_one_before() -> None:
    data = made([row % 7 for row in range(9)])
    assert [len(batch) for batch in rows_of(data, 4, 0)] == [4, 5]
    assert [len(batch) for batch in rows_of(data, 4, None)] == [4, 4, 1]  # no BatchNorm learns here
    assert [len(batch) for batch in rows_of(made([0]), 4, 0)] == [1]


def test_another_seed_shuffles_otherwise() -> None:
    data = made([row % 7 for row in range(50)])
    assert rows_of(data, 10, 0) != rows_of(data, 10, 1)


def test_only_training_batches_are_augmented() -> None:
    items = torch.arange(256, dtype=torch.uint8).view(64, 1, 2, 2)
    data = Dataset(
        items=items,
        labels=torch.zeros(64, dtype=torch.int64),
        encode=ImageEncoder(scale=1.0),
        augment=Augmentation(padding=0, flip=True),
    )
    assert torch.equal(next(data.batches(64)).inputs, items.float())
    trained = next(data.batches(64, generator=torch.Generator().manual_seed(0))).inputs
    mirrored = (trained[:, 0, 0, 0] > trained[:, 0, 0, 1]).sum()
    assert 15 < mirrored < 49  # half of 64, within four standard deviations


def test_no_batches_of_no_examples() -> None:
    assert list(made([0, 1]).select([]).batches(4)) == []
    assert list(made([0, 1]).select([]).batches(4, generator=torch.Generator())) == []


def test_to_moves_everything() -> None:
    moved = made([0, 1], [0, 1]).select([1]).to("meta")
    for part in (moved.items, moved.labels, moved.groups, moved.rows):
        assert part is not None
        assert part.device.type == "meta"


def test_a_class_without_a_name_is_called_by_its_number(digits: Dataset) -> None:
    plain = Dataset(items=digits.items, labels=digits.labels, encode=digits.encode)
    named = Dataset(items=digits.items, labels=digits.labels, encode=digits.encode, classes=("zero", "one"))
    assert plain.class_name(1) == "1"
    assert [named.class_name(label) for label in range(3)] == ["zero", "one", "2"]
