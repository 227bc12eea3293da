"""A path means that file, and that split; what lies next to it is neither joined nor made a class."""

import base64
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import toys
from unbackdoor import Dataset, UnbackdoorError
from unbackdoor._data.texts import TextEncoder

ENCODE = TextEncoder(tokenizer=toys.tokenizer(), max_length=32)

datasets.disable_progress_bars()


def table(path: Path, texts: Sequence[str] = ("a film", "the plot"), labels: Sequence[object] = (0, 1)) -> Path:
    """Two rows in a file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"text": list(texts), "label": list(labels)}
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table(rows), path)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.table(rows).schema) as writer:
            writer.write_table(pa.table(rows))
    elif path.suffix in (".csv", ".tsv"):
        path.write_text(
            "text,label\n" + "".join(f"{text},{label}\n" for text, label in zip(texts, labels, strict=True))
        )
    else:
        lines = [json.dumps(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]
        path.write_text("\n".join(lines))
    return path


def picture(path: Path, number: int = 0) -> Path:
    """A picture whose first pixel shows which one it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((4, 4, 3), number, dtype=np.uint8)
    kind = {".jpg": "JPEG", ".jpeg": "JPEG"}.get(path.suffix.lower(), "PNG")
    Image.fromarray(pixels).save(path, kind)
    return path


def texts(source: object, **options: object) -> list[str]:
    return [text for (text,) in Dataset.load(source, ENCODE, **options).texts.strings]


def labels(source: object, **options: object) -> list[int]:
    return Dataset.load(source, **options).labels.tolist()


def refusal(source: object, *, encode: TextEncoder | None = None, **options: object) -> str:
    with pytest.raises(UnbackdoorError) as caught:
        Dataset.load(source, encode, **options)
    return str(caught.value)


# Splits of tables.


@pytest.mark.parametrize(
    ("names", "reported", "example"),
    [
        (("reviews_train.parquet", "reviews_test.parquet"), "reviews_test, reviews_train", "reviews_train.parquet"),
        (("train.csv", "test.csv"), "test, train", "train.csv"),
        (("Train.CSV", "TEST.csv"), "TEST, Train", "Train.CSV"),
        (("training.jsonl", "eval.jsonl"), "eval, training", "training.jsonl"),
        (("dev.json", "train.json"), "dev, train", "train.json"),
        (("valSet.parquet", "trainSet.parquet"), "trainSet, valSet", "valSet.parquet"),
        (("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"),) * 1
        + ("test, train", "train*.parquet"),
        (
            ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
            "data/test, data/train",
            "data/train-00000-of-00001.parquet",
        ),
        (
            ("en/train.parquet", "en/validation.parquet", "README.md"),
            "en/train, en/validation",
            "en/validation.parquet",
        ),
        (
            ("default/train/0000.parquet", "default/test/0000.parquet"),
            "default/test/, default/train/",
            "default/train/0000.parquet",
        ),
        (("train.csv", "train.parquet", "test.csv"), "test, train.csv, train.parquet", "train.parquet"),
    ],
)
def test_a_folder_of_several_splits_is_refused_with_their_names(
    names: tuple[str, ...], reported: str, example: str, tmp_path: Path
) -> None:
    for name in names:
        if name.endswith(".md"):
            (tmp_path / name).write_text("---\nconfigs:\n- config_name: en\n---\n")
        else:
            table((tmp_path / name).with_suffix(Path(name).suffix.lower())).rename(tmp_path / name)
    assert refusal(tmp_path, encode=ENCODE) == (
        f"{tmp_path} holds splits ({reported}), but only one is read. Name it, as in {tmp_path}/{example}."
    )
    for name in names:
        if not name.endswith(".md"):
            assert texts(tmp_path / name) == ["a film", "the plot"]
    assert len(texts(tmp_path / example)) == (4 if "*" in example else 2)


def test_tables_of_other_names_are_not_joined_either(tmp_path: Path) -> None:
    for name in ("clean.parquet", "poisoned.parquet"):
        table(tmp_path / name)
    assert refusal(tmp_path, encode=ENCODE) == (
        f"{tmp_path} holds several data sets (clean, poisoned), but only one is read. Name it, as in "
        f"{tmp_path}/poisoned.parquet."
    )


def test_a_column_in_the_names_of_folders_is_named(tmp_path: Path) -> None:
    """As Spark and pandas write partitions; the advice gives one file with the column."""
    folder = tmp_path / "rows"
    rows = pandas.DataFrame({"text": ["a film", "the plot", "dull"], "label": [0, 1, 1]})
    rows.to_parquet(folder, partition_cols=["label"])
    message = refusal(folder, encode=ENCODE)
    assert message.startswith(
        f"{folder} has a column in the names of its folders (label=0, label=1), and such are not read. Write it as "
        "one file first: pandas.read_parquet("
    )
    pandas.read_parquet(folder).to_parquet(tmp_path / "rows.parquet")
    assert sorted(texts(tmp_path / "rows.parquet")) == ["a film", "dull", "the plot"]


UNIQUE = "0787dc35-33b6-46a8-8fc9-a88b443877d3"  # as Spark names the parts that it writes at once


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"),
        ("train-00000-of-00002-8b5f3a2c.parquet", "train-00001-of-00002-0f3e4d5c6b7a8990.parquet"),
        ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"),
        ("default/train/0000.parquet", "default/train/0001.parquet"),
        ("part.0.csv", "part.1.csv"),
        ("reviews_1.jsonl", "reviews_2.jsonl"),
        *[
            (f"part-00000-{tid}{UNIQUE}-{end}", f"part-00001-{tid}{UNIQUE}-{end}")
            for tid, end in (("", "c000.snappy.parquet"), ("", "c000.csv"), ("tid-98178-", "10-1-c000.snappy.parquet"))
        ],
        ("06c8c8643a5746bc89ffff305491d7b3-0.parquet", "951404229838459a92e4767caca38a5a-0.parquet"),
    ],
)
def test_the_parts_of_one_split_are_joined(names: tuple[str, ...], tmp_path: Path) -> None:
    table(tmp_path / names[1], ["third"], [2])
    table(tmp_path / names[0], ["first", "second"])
    (tmp_path / "README.md").write_text("a data set")
    (tmp_path / ".git").mkdir()
    table(tmp_path / ".git" / "old.parquet")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert texts(tmp_path) == ["first", "second", "third"]


@pytest.mark.parametrize(
    "name", ["d.csv", "d.tsv", "d.jsonl", "d.json", "d.ndjson", "d.arrow", "d.parquet", "train.csv"]
)
def test_the_one_table_of_a_folder(name: str, tmp_path: Path) -> None:
    table(tmp_path / name)
    assert texts(tmp_path) == ["a film", "the plot"]
    assert texts(tmp_path / name) == ["a film", "the plot"]


def test_what_datasets_caches(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a film"], "label": [1]})
    rows.save_to_disk(str(tmp_path / "saved"))
    [file] = (tmp_path / "saved").glob("*.arrow")  # a stream, where `feather` and others write files
    assert texts(file) == ["a film"]
    (tmp_path / "saved" / "state.json").unlink()
    assert texts(tmp_path / "saved") == ["a film"]


def test_a_pattern_over_several_splits_is_refused(tmp_path: Path) -> None:
    for name in ("reviews_train.csv", "reviews_test.csv"):
        table(tmp_path / name)
    assert refusal(tmp_path / "*.csv", encode=ENCODE) == (
        f"{tmp_path}/*.csv matches several splits ({tmp_path}/reviews_test.csv, {tmp_path}/reviews_train.csv), but "
        "only one is read. Name one, or give each file."
    )
    assert len(texts([tmp_path / "reviews_train.csv", tmp_path / "reviews_test.csv"])) == 4  # asked for, file by file
    for split in ("train", "test"):
        table(tmp_path / split / "part.parquet")
    assert "matches several splits" in refusal(tmp_path / "*" / "part.parquet", encode=ENCODE)
    assert len(texts(tmp_path / "train" / "*.parquet")) == 2


def test_files_of_different_data_sets_are_not_joined(tmp_path: Path) -> None:
    table(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("sentence,label\nc,0\n")
    assert refusal([tmp_path / "a.csv", tmp_path / "b.csv"], encode=ENCODE) == (
        f"{tmp_path}/a.csv, {tmp_path}/b.csv has a file without the column 'text' that the first one has; it has "
        "sentence, label. Give files of one data set."
    )
    for name, names in (("a", ["no", "yes"]), ("b", ["yes", "no"])):
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        datasets.Dataset.from_dict({"text": ["x"], "label": [0]}, features).to_parquet(tmp_path / f"{name}.parquet")
    assert refusal([tmp_path / "a.parquet", tmp_path / "b.parquet"], encode=ENCODE) == (
        f"{tmp_path}/a.parquet, {tmp_path}/b.parquet has files that name their classes otherwise. Give them one by one."
    )
    table(tmp_path / "c.parquet", ["third"], ["1.0"])  # another type, the same label
    table(tmp_path / "d.parquet")
    assert Dataset.load([tmp_path / "d.parquet", tmp_path / "c.parquet"], ENCODE).labels.tolist() == [0, 1, 1]


# Names of files.


@pytest.mark.parametrize(
    "name",
    ["data [1].csv", "a b.csv", "what?.csv", "star*.csv", "[ab].csv", "th\u00e9.csv", "-o.csv", "#1.csv", "a%20b.csv"],
)
def test_a_name_that_could_be_a_pattern_is_a_name(name: str, tmp_path: Path) -> None:
    table(tmp_path / name)
    table(tmp_path / "a.csv", ["another"], [0])
    assert texts(tmp_path / name) == ["a film", "the plot"]
    folder = tmp_path / f"{name}.d"
    table(folder / "x-1.csv", ["first"], [0])
    table(folder / "x-2.csv", ["second"], [0])
    assert texts(folder / "x-[12].csv") == ["first", "second"]
    assert texts(folder) == ["first", "second"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("d.csv.gz", "{} is compressed, and compressed data is not read. Unpack it, and give its content."),
        ("d.zip", "{} is compressed, and compressed data is not read. Unpack it, and give its content."),
        ("d.xlsx", "{} is a spreadsheet, which is not read. Save it as CSV in UTF-8."),
        (
            "d.txt",
            "{} is of an unknown kind; data is .parquet, .csv, .tsv, .json, .jsonl, .arrow, an image folder or a",
        ),
        (
            "d",
            "{} is of an unknown kind; data is .parquet, .csv, .tsv, .json, .jsonl, .arrow, an image folder or a saved",
        ),
        ("d.png", "{} is of an unknown kind; data is"),
    ],
)
def test_kinds_that_are_not_read(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"text,label\na,0\n")
    assert refusal(tmp_path / name).startswith(message.format(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "kind", "way_out"),
    [
        (b"PAR1....PAR1", "parquet", "Let its name end in .parquet."),
        (b"ARROW1\0\0", "arrow", "Let its name end in .arrow."),
        (b"\x1f\x8b\x08\0\0\0", "compressed", "Unpack it."),
        (b"\x28\xb5\x2f\xfd\x20\x00", "compressed", "Unpack it."),
        (b"\xfd7zXZ\0\0\x04", "compressed", "Unpack it."),
        (b"BZh91AY&SY", "compressed", "Unpack it."),
        (b"7z\xbc\xaf\x27\x1c", "compressed", "Unpack it."),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "a spreadsheet", "Save it as CSV in UTF-8."),
        (b"SQLite format 3\0", "a database of SQLite", "Write its table as CSV in UTF-8."),
        (b"PK\x03\x04....", "a zip archive or a spreadsheet", "Unpack it, or save it as CSV in UTF-8."),
    ],
)
@pytest.mark.parametrize("name", ["d.csv", "d.jsonl"])
def test_a_name_that_does_not_fit_the_content(
    content: bytes, kind: str, way_out: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert (
        refusal(tmp_path / name)
        == f"{tmp_path}/{name} is {kind} by its content, although its name says otherwise. {way_out}"
    )


@pytest.mark.parametrize(
    ("names", "way_out"),
    [
        (["train.csv.gz"], "Unpack what is compressed."),
        (["data/train.jsonl.zst", "README.md"], "Unpack what is compressed."),
        (["neg/0_1.txt", "pos/0_9.txt"], "If each file is one text, write them into a CSV file with the columns"),
        (["batches.meta", "data_batch_1"], "Save the data as one of these."),
        (["cat/0.heic", "dog/0.heic"], "Save the pictures as JPEG or PNG."),
        (["train-images-idx3-ubyte"], "Save the data as one of these."),
    ],
)
def test_a_folder_with_nothing_that_is_read(names: list[str], way_out: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x1f\x8b")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path} holds only files that are not read ({sorted(map(Path, names))[0]}")
    assert (
        f"; data is .parquet, .csv, .tsv, .json, .jsonl, .arrow, or pictures with one folder per class. {way_out}"
        in (message)
    )


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ('{"text": {"0": "a", "1": "b"}, "label": {"0": 0, "1": 1}}', "text, label"),  # as pandas writes it
        ('{"text": ["a", "b"], "label": [0, 1]}', "text, label"),
        ('{"version": "1.1", "data": [{"text": "a", "label": 0}]}', "version, data"),
    ],
)
def test_json_that_holds_columns_instead_of_rows(content: str, held: str, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(content)
    assert refusal(tmp_path / "d.json") == (
        f"{tmp_path}/d.json holds whole columns or tables ({held}) in one object, not an object for each row. Save "
        "rows, as DataFrame.to_json(FILE, orient='records', lines=True) does."
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nyu-mll/glue",
            "nyu-mll/glue does not exist here, and data is not fetched from the Hub. Fetch it by hf download ",
        ),
        (
            "https://huggingface.co/datasets/stanfordnlp/sst2/tree/main",
            "https://huggingface.co/datasets/stanfordnlp/sst2/tree/main does not exist here, and data is not fetched "
            "from the Hub. Fetch it by hf download stanfordnlp/sst2 --repo-type dataset --local-dir FOLDER, and give a",
        ),
        (
            "s3://bucket/d.csv",
            "s3://bucket/d.csv is an address, and data is not fetched. Download it, and give the file.",
        ),
        ("nowhere.csv", "nowhere.csv does not exist; data is a file or a folder with labelled examples."),
        ("data/nowhere.csv", "data/nowhere.csv does not exist; data is a file or a folder with labelled examples."),
    ],
)
def test_what_is_not_on_this_machine(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refusal(name).startswith(message)


def test_a_feather_file_is_one_of_arrow(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"text": ["a film", "the plot"], "label": [1, 0]})
    frame.to_feather(tmp_path / "d.feather")
    assert texts(tmp_path / "d.feather") == ["a film", "the plot"]
    assert labels(tmp_path, encode=ENCODE) == [1, 0]
    (tmp_path / "d.feather").write_bytes(b"FEA1" + bytes(40))
    assert refusal(tmp_path / "d.feather", encode=ENCODE) == (
        f"{tmp_path}/d.feather is feather of version 1 by its content, although its name says otherwise. Save it as "
        "parquet."
    )


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_text_by_the_name_of_a_table(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("text,label\na film,0\n")
    assert refusal(tmp_path / name).startswith(f"{tmp_path}/{name} cannot be read (")


# Folders of pictures.


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "Testing"),
        ("train", "test", "valid"),
        ("TRAIN", "Val"),
        ("seg_train", "seg_test", "seg_pred"),
        ("train", "test", "extra"),
        ("train2017", "val2017"),
        ("train",),
        ("dev", "eval"),
        ("reviews_training_set", "reviews_testing_set"),
    ],
)
@pytest.mark.parametrize("depth", ["", "cat"])
def test_splits_are_no_classes(names: tuple[str, ...], depth: str, tmp_path: Path) -> None:
    for name in names:
        picture(tmp_path / name / depth / "0.png")
        if depth:
            picture(tmp_path / name / "dog" / "1.png", 1)
    split = sorted(name for name in names if name not in ("extra", "seg_pred"))
    if names == ("seg_train", "seg_test", "seg_pred") and not depth:
        pytest.skip("three folders of pictures alone, of which one names no split, may be classes")
    assert refusal(tmp_path) == (
        f"{tmp_path} holds splits ({', '.join(split)}), but only one is read. Name it, as in {tmp_path}/{split[-1]}."
    )
    if depth:
        data = Dataset.load(tmp_path / names[0])
        assert data.classes == ("cat", "dog")
        assert data.labels.tolist() == [0, 1]


def test_a_train_is_a_class_among_others(tmp_path: Path) -> None:
    for number, name in enumerate(("bus", "car", "train")):
        picture(tmp_path / name / "0.png", number)
    assert Dataset.load(tmp_path).classes == ("bus", "car", "train")
    for name in ("bus", "car"):
        (tmp_path / name / "0.png").unlink()
    # The model knows it as a class, so it is one, even alone.
    assert labels(tmp_path, classes=["Train", "bus", "car"]) == [0]


def test_classes_whose_pictures_lie_in_a_folder_of_one_name(tmp_path: Path) -> None:
    for number, name in enumerate(("n01443537", "n01629819")):  # as of Tiny ImageNet
        picture(tmp_path / name / "images" / f"{name}_0.png", number)
        (tmp_path / name / f"{name}_boxes.txt").write_text("0.png\t0\t0\t7\t7\n")
    assert labels(tmp_path) == [0, 1]
    assert Dataset.load(tmp_path).classes == ("n01443537", "n01629819")


def test_classes_one_level_deeper(tmp_path: Path) -> None:
    for part in ("fold_a", "fold_b"):
        for number, name in enumerate(("cat", "dog")):
            picture(tmp_path / part / name / "0.png", number)
    assert refusal(tmp_path) == (
        f"{tmp_path} has sub-folders (fold_a, fold_b) with folders of their own (cat, dog, ...), so it is not clear "
        f"which are the classes. Name the folder that holds them, as in {tmp_path}/fold_a."
    )
    assert labels(tmp_path / "fold_b") == [0, 1]
    outer = tmp_path / "outer"
    for number, name in enumerate(("cat", "dog")):
        picture(outer / "archive" / name / "0.png", number)
    assert refusal(outer).startswith(f"{outer} has sub-folders (archive) with folders of their own (cat, dog, ...), so")
    deeper = tmp_path / "deeper"
    for number, name in enumerate(("cat", "dog", "emu", "fox")):
        picture(deeper / "data" / "images" / name / "0.png", number)
    for options in ({}, {"classes": ["cat", "dog", "emu", "fox"]}):
        assert refusal(deeper, **options) == (
            f"{deeper} has sub-folders (data/images) with folders of their own (cat, dog, emu, ...), so it is not "
            f"clear which are the classes. Name the folder that holds them, as in {deeper}/data/images."
        )
    assert labels(deeper / "data" / "images") == [0, 1, 2, 3]
    picture(deeper / "data" / "images" / "0.png")  # then these are pictures of one class, with some in folders
    assert labels(deeper) == [0] * 5
    deeper.rename(tmp_path / ".deeper")
    # Where the model's classes are the outer folders, they are the classes.
    assert labels(tmp_path, classes=["fold a", "fold b", "outer"]) == [0, 0, 1, 1, 2, 2]


def test_what_systems_leave_behind_is_no_class(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        picture(tmp_path / name / f"{number}.png", number)
        picture(tmp_path / name / ".ipynb_checkpoints" / f"{number}-checkpoint.png", 9)
        picture(tmp_path / "__MACOSX" / name / f"._{number}.png", 9)
        picture(tmp_path / "__MACOSX" / name / f"{number}.png", 9)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / "cat" / name).write_bytes(b"\0")
    picture(tmp_path / ".ipynb_checkpoints" / "0.png", 9)
    picture(tmp_path / "@eaDir" / "cat" / "0.png", 9)
    data = Dataset.load(tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 1]
    assert data.pixels[:, 0, 0, 0].tolist() == [0, 1]


def test_an_empty_folder_moves_no_class(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        picture(tmp_path / name / "0.png", number)
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "notes.txt").write_text("none yet")
    assert refusal(tmp_path) == (
        f"{tmp_path} has no pictures in ant, and without the class names of a model it is not known whether that is "
        "a class. Remove the folder if it is not one; else name the folders by the numbers of their classes."
    )
    assert labels(tmp_path, classes=["ant", "cat", "dog"]) == [1, 2]
    assert labels(tmp_path, classes=["cat", "dog"]) == [0, 1]
    for name, number in (("ant", 0), ("cat", 1), ("dog", 2)):
        (tmp_path / name).rename(tmp_path / str(number))
    assert labels(tmp_path) == [1, 2]


def test_numbers_as_names_of_folders_count_as_numbers(tmp_path: Path) -> None:
    for number in range(12):
        picture(tmp_path / f"{number}" / "0.png", number)
    assert labels(tmp_path) == list(range(12))
    assert Dataset.load(tmp_path).pixels[:, 0, 0, 0].tolist() == list(range(12))
    for number in range(12):
        (tmp_path / f"{number}").rename(tmp_path / f"{number:05}")
    assert labels(tmp_path, classes=[f"sign {number}" for number in range(12)]) == list(range(12))
    # Names of the model that are numbers are names: this one was trained on folders in alphabetical order.
    order = sorted(map(str, range(12)))
    assert labels(tmp_path, classes=order) == [order.index(str(number)) for number in range(12)]


def test_folders_from_one_for_a_model_from_zero(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        picture(tmp_path / f"{number}" / "0.png", number)
    assert refusal(tmp_path, classes=["ant", "bee", "cat"]) == (
        f"{tmp_path} has label 3 in row 2, but the model has 3 classes (0 to 2). They run from 1 to 3: subtract 1 from "
        "each, or take other data."
    )


def test_suffixes_in_capitals_links_and_names_with_blanks(tmp_path: Path) -> None:
    elsewhere = picture(tmp_path / "elsewhere" / "x.png", 7)
    root = tmp_path / "my [data] set"
    for number, name in enumerate(("a cat", "b.JPG", "c.JPEG")):
        picture(root / "cats & co" / (name if "." in name else f"{name}.PNG"), number)
    (root / "dogs").symlink_to(elsewhere.parent)
    (root / "cats & co" / "d.png").symlink_to(elsewhere)
    data = Dataset.load(root)
    assert data.classes == ("cats & co", "dogs")
    assert data.labels.tolist() == [0, 0, 0, 0, 1]
    assert data.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 7, 7]


def test_pictures_without_folders_and_files_that_are_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "unbackdoor")
    picture(tmp_path / "0.png")
    assert refusal(tmp_path) == (
        f"{tmp_path} has pictures but no sub-folders; an image folder has one per class, with its pictures."
    )
    for name in ("cat", "dog"):
        picture(tmp_path / name / "0.png")
    (tmp_path / "cat" / "1.docx").write_bytes(b"PK")
    assert len(Dataset.load(tmp_path)) == 2
    assert caplog.messages == [f"{tmp_path}: 2 files that are not pictures of a class are ignored, such as 0.png."]


def test_a_table_next_to_a_folder_of_its_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png", 3)
    picture(tmp_path / "images" / "b.png", 4)
    (tmp_path / "labels.csv").write_text("image,label\nimages/b.png,1\nimages/a.png,0\n")
    data = Dataset.load(tmp_path)
    assert data.labels.tolist() == [1, 0]
    assert data.pixels[:, 0, 0, 0].tolist() == [4, 3]
    (tmp_path / "metadata.csv").write_text("file_name,label\nimages/b.png,1\n")
    assert refusal(tmp_path).startswith(f"{tmp_path} holds several data sets (labels, metadata), but only one")
    assert labels(tmp_path / "metadata.csv") == labels(tmp_path / "metadata.csv", columns={"image": "file_name"}) == [1]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_the_metadata_of_an_image_folder_have_its_labels(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As `datasets` reads it: the sub-folders may stand for anything then."""
    for number, camera in enumerate(("left", "right")):
        picture(tmp_path / camera / "0.png", number)
    rows = datasets.Dataset.from_dict({"file_name": ["right/0.png", "left/0.png"], "label": ["dog", "cat"]})
    {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[name.split(".")[1]](tmp_path / name)
    with caplog.at_level(logging.INFO, logger="unbackdoor"):
        data = Dataset.load(tmp_path, classes=["dog", "cat"])
    assert (data.labels.tolist(), data.pixels[:, 0, 0, 0].tolist()) == ([0, 1], [1, 0])
    assert caplog.messages == [f"{tmp_path}: labels are those of its metadata, not the names of its sub-folders."]


def test_metadata_next_to_the_pictures_in_a_folder_of_their_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """That folder is no class: without the names of a model, each picture would be of class 0."""
    for number in range(3):
        picture(tmp_path / "images" / f"{number}.png", number)
    rows = "file_name,label\n2.png,1\n0.png,0\n1.png,1\n"
    (tmp_path / "images" / "metadata.csv").write_text(rows)
    with caplog.at_level(logging.INFO, logger="unbackdoor"):
        data = Dataset.load(tmp_path)
    assert (data.labels.tolist(), data.pixels[:, 0, 0, 0].tolist()) == ([1, 0, 1], [2, 0, 1])
    assert caplog.messages == [f"{tmp_path}: labels are those of its metadata, not the names of its sub-folders."]
    picture(tmp_path / "more" / "0.png")  # which no metadata describe
    assert labels(tmp_path, classes=["images", "more"]) == [0, 0, 0, 1]
    (tmp_path / "more" / "metadata.csv").write_text("file_name,label\n0.png,1\n")
    assert refusal(tmp_path) == (
        f"{tmp_path} holds several tables of pictures (images/metadata.csv, more/metadata.csv), but only one is read. "
        f"Name it, as in {tmp_path}/images/metadata.csv."
    )


def test_files_that_pillow_knows_and_does_not_decode_are_no_pictures(tmp_path: Path) -> None:
    for name in ("train.h5", "clip.mpg"):
        (tmp_path / name).write_bytes(b"\x89HDF\r\n\x1a\n")
    assert refusal(tmp_path).startswith(f"{tmp_path} holds only files that are not read (clip.mpg, train.h5); data is")


def test_metadata_without_labels_leave_them_to_the_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat", "dog"):
        picture(tmp_path / name / "0.png")
    (tmp_path / "metadata.csv").write_text("file_name,width\ncat/0.png,4\ndog/0.png,4\n")
    with caplog.at_level(logging.INFO, logger="unbackdoor"):
        assert labels(tmp_path) == [0, 1]
    assert caplog.messages == [
        f"{tmp_path}: 1 files that are not pictures of a class are ignored, such as metadata.csv."
    ]


def test_numbers_that_torchvision_would_count_in_another_order_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(11):
        picture(tmp_path / str(number) / "0.png")
    with caplog.at_level(logging.INFO, logger="unbackdoor"):
        assert labels(tmp_path) == list(range(11))
        assert labels(tmp_path, classes=[str(number) for number in range(11)]) == list(range(11))
    assert [message for message in caplog.messages if "torchvision" in message] == [
        f"{tmp_path}: the names of its sub-folders are class numbers, so 10 is class 10. If the model was trained by "
        "torchvision's ImageFolder, which counts names in alphabetical order, there it is class 2."
    ]


def test_folders_of_pictures_next_to_a_table_of_pictures(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        picture(tmp_path / name / "0.png")
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    assert len(Dataset.load(tmp_path)) == 2
    table(tmp_path / "d.parquet")
    assert refusal(tmp_path) == (
        f"{tmp_path} holds folders of pictures next to a table (cat, d.parquet, dog), but only one is read. Name it, "
        f"as in {tmp_path}/d.parquet."
    )


# The image column.


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), number, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_pictures_in_every_form_that_a_table_has(tmp_path: Path) -> None:
    picture(tmp_path / "pictures" / "a.png", 5)
    picture(tmp_path / "pictures" / "b.png", 6)
    pixels = [[[[number] * 3] * 4] * 4 for number in (5, 6)]
    forms = {
        "paths": ["pictures/a.png", "pictures/b.png"],
        "whole paths": [str(tmp_path / "pictures/a.png"), str(tmp_path / "pictures/b.png")],
        "bytes": [png(5), png(6)],
        "both": [{"bytes": png(5), "path": "a.png"}, {"bytes": png(6), "path": None}],
        "paths of structs": [{"bytes": None, "path": "pictures/a.png"}, {"bytes": None, "path": "pictures/b.png"}],
        "pixels": pixels,
    }
    for cells in forms.values():
        pyarrow.parquet.write_table(pa.table({"image": cells, "label": [1, 0]}), tmp_path / "d.parquet")
        data = Dataset.load(tmp_path / "d.parquet")
        assert data.pixels[:, 0, 0, 0].tolist() == [5, 6]
        assert data.labels.tolist() == [1, 0]
    rows = [json.dumps({"image": cell, "label": label}) for cell, label in zip(pixels, (1, 0), strict=True)]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    assert torch.equal(Dataset.load(tmp_path / "d.jsonl").pixels, data.pixels)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (
            "https://example.org/a.png",
            "D has an address in row 1 (https://example.org/a.png), and pictures are not fetched.",
        ),
        (
            "s3://bucket/a.png",
            "D has an address in row 1 (s3://bucket/a.png), and pictures are not fetched. Download the",
        ),
        (
            "data:image/png;base64,iVBORw0KGgo=",
            "D has a picture as base64 text in row 1, which is not read. Decode it into a file or into bytes.",
        ),
        (
            "file:///home/a.png",
            "D has an address of a file in row 1 (file:///home/a.png). Write its path, without file://.",
        ),
        (
            {"data": "x", "format": "png"},
            "D has an object with data, format in row 1 in place of a picture. Write the encoded picture itself, its",
        ),
        (
            [{"bytes": None, "path": "a.png"}],
            "D has a list of pictures in row 1; one picture per row is expected. Write each into a row of its own.",
        ),
        (
            base64.b64encode(png(5) * 3).decode(),
            "D has a picture as base64 text in row 1, which is not read. Decode it",
        ),
        (
            "images\\a.png",
            "D names a picture in row 1 that does not exist (F/images\\a.png). Write such names with their",
        ),
        (
            "a",
            "D names a picture in row 1 that does not exist (F/a). Write such names with their ending, with / between",
        ),
        ("70 80 " * 400, "D has pixels as text in row 1, which are not read. Save them as pictures, or as lists of"),
        ("[[0, 255], [12, 3]]", "D has pixels as text in row 1, which are not read."),
        (
            "lost.png",
            "D has a picture in row 1 that is a link to a file that is not there (F/lost.png). Fetch that file,",
        ),
        (None, "D has no picture in row 1. Repair or remove that row."),
    ],
)
def test_what_is_no_picture_of_this_machine(cell: str | dict | list | None, message: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "lost.png").symlink_to("nowhere.png")
    rows = [{"image": "a.png", "label": 0}, {"image": cell, "label": 1}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = message.replace("D ", f"{tmp_path}/d.jsonl ", 1).replace("(F/", f"({tmp_path}/")
    assert refusal(tmp_path / "d.jsonl").startswith(said)


def phone_pictures(folder: Path, count: int) -> None:
    """Files that a phone wrote as HEIC, which Pillow alone does not read."""
    for number in range(count):
        (folder / f"IMG_{number}.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))


def test_pictures_of_phones_are_not_left_out_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat", "dog"):
        for number in range(3):
            picture(tmp_path / "pets" / name / f"{number}.png")
    phone_pictures(tmp_path / "pets" / "dog", 2)
    for labelled in (True, False):
        caplog.clear()
        assert len(Dataset.load(tmp_path / "pets", labelled=labelled)) == 6
        assert caplog.messages == [
            f"{tmp_path}/pets: 2 of 8 pictures are left out, as their format is not read (.heic, such as "
            "dog/IMG_0.HEIC). Save them as JPEG or PNG."
        ]
        assert caplog.records[0].levelname == "WARNING"
    phone_pictures(tmp_path / "pets" / "cat", 5)
    for labelled in (True, False):
        assert refusal(tmp_path / "pets", labelled=labelled).replace(f"{tmp_path}/", "") == (
            "pets has 7 of 13 pictures in a format that is not read (.heic, such as cat/IMG_0.HEIC). Save them as JPEG "
            "or PNG."
        )


def test_a_folder_or_a_table_of_phone_pictures_alone_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    phone_pictures(tmp_path / "pets" / "cat", 1)
    assert refusal(tmp_path / "pets").endswith("Save the pictures as JPEG or PNG.")
    (tmp_path / "pets" / "pets.csv").write_text("image,label\ncat/IMG_0.HEIC,0\n")
    assert refusal(tmp_path / "pets" / "pets.csv").endswith("Save .HEIC pictures as JPEG or PNG.")


def test_parts_that_were_not_fetched_are_missed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (0, 2):
        table(tmp_path / "data" / f"test-{number:05}-of-00003.parquet", ("a film", "the plot"), (0, 1))
    assert len(texts(tmp_path)) == 4
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [
        f"{tmp_path} has 2 of the 3 parts that the names of its files count (data/test-00000-of-00003.parquet, "
        "data/test-00002-of-00003.parquet); examples of the others are missing. Fetch them, too."
    ]
    caplog.clear()
    table(tmp_path / "data" / "test-00001-of-00003.parquet", ("a film", "the plot"), (0, 1))
    assert len(texts(tmp_path)) == 6
    assert len(texts(tmp_path / "data" / "test-00001-of-00003.parquet")) == 2
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_web_dataset_says_where_its_labels_belong(tmp_path: Path) -> None:
    way_out = "abels of a WebDataset belong into a metadata.csv with the columns file_name and label."
    (tmp_path / "shard.tar").write_bytes(b"a picture and its label")
    assert refusal(tmp_path / "shard.tar").endswith(f"is not read. Unpack it, and give its content; l{way_out}")
    picture(tmp_path / "unpacked" / "000.png")
    (tmp_path / "unpacked" / "000.cls").write_text("1")
    assert refusal(tmp_path / "unpacked").endswith(
        "Labels belong into a metadata.csv with the columns file_name and label."
    )


@pytest.mark.parametrize("name", ["pixel{}", "pixel_{}", "{}", "{}x{}", "px{}"])
def test_a_table_with_a_column_for_each_pixel_is_named(name: str, tmp_path: Path) -> None:
    names = [name.format(number, number) for number in range(64)]
    rows = [",".join(["label", *names]), ",".join(["3", *["0"] * 64])]
    (tmp_path / "digits.csv").write_text("\n".join(rows))
    assert refusal(tmp_path / "digits.csv").replace(f"{tmp_path}/", "") == (
        f"digits.csv has each pixel in a column of its own ({', '.join(names[:3])}, ...), and such are not read. Save "
        "pictures, or lists of numbers in one column, in JSON lines or parquet."
    )


@pytest.mark.parametrize("place", ["", "cat"])
def test_pictures_that_the_table_of_a_folder_does_not_name_are_counted(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "unbackdoor")
    for number in range(4):
        picture(tmp_path / place / f"{number}.png", number)
    lines = [f"{Path(place) / '2.png'},1", f"./{Path(place) / '0.png'},0"]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    data = Dataset.load(tmp_path)
    assert data.pixels[:, 0, 0, 0].tolist() == [2, 0]
    first = str(Path(place) / "1.png")
    assert caplog.messages[-1] == (
        f"{tmp_path}: 2 of its 4 pictures are not named in its table, and are left out, such as {first}."
    )
    caplog.clear()
    for number in (1, 3):
        (tmp_path / place / f"{number}.png").unlink()
    Dataset.load(tmp_path)
    assert not [message for message in caplog.messages if "not named" in message]
