"""Labels: one and the same score, however they are spelt and in whatever file they lie."""

import csv
import io
import json
import logging
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch import nn

import toys
from commands import Refusals
from unbackdoor import Dataset, UnbackdoorError, evaluate, load, purifiers, purify
from unbackdoor._data.labels import class_numbers
from unbackdoor._data.texts import TextEncoder
from unbackdoor._models.calling import class_names
from unbackdoor._models.saving import check_saved

NAMES = ["negative", "neutral", "very positive"]
CLASSES = [2, 0, 1, 0, 2, 1]
TEXTS = [f"the film is good {'very ' * row}fine" for row in range(6)]
ENCODE = TextEncoder(tokenizer=toys.tokenizer(), max_length=32)

datasets.disable_progress_bars()


# Each spelling of the classes 2, 0, 1, 0, 2, 1 for a model whose classes are negative, neutral and very positive.
SPELLINGS: dict[str, list] = {
    "whole numbers": CLASSES,
    "numbers with a point": [float(number) for number in CLASSES],
    "numbers as text": [str(number) for number in CLASSES],
    "numbers with a point as text": [f"{number}.0" for number in CLASSES],
    "numbers in blanks": [f" {number}" for number in CLASSES],
    "numbers with a leading zero": [f"0{number}" for number in CLASSES],
    "names": [NAMES[number] for number in CLASSES],
    "names in blanks": [NAMES[number] + " " * (row % 3) for row, number in enumerate(CLASSES)],
    "names in capitals": [NAMES[number].upper() for number in CLASSES],
    "names in several cases": [
        NAMES[number].title() if row % 2 else NAMES[number] for row, number in enumerate(CLASSES)
    ],
    "names with underscores": [NAMES[number].replace(" ", "_") for number in CLASSES],
    "names with hyphens": [NAMES[number].replace(" ", "-") for number in CLASSES],
    "names as transformers makes them": [f"LABEL_{number}" for number in CLASSES],
}


def csv_file(folder: Path, labels: list, delimiter: str = ",", name: str = "d.csv") -> Path:
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["text", "label"], *zip(TEXTS, labels, strict=True)])
    return folder / name


def tsv_file(folder: Path, labels: list) -> Path:
    return csv_file(folder, labels, "\t", "d.tsv")


def lines_file(folder: Path, labels: list) -> Path:
    rows = [json.dumps({"text": text, "label": label}) for text, label in zip(TEXTS, labels, strict=True)]
    (folder / "d.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "d.jsonl"


def array_file(folder: Path, labels: list) -> Path:
    rows = [{"label": label, "text": text} for text, label in zip(TEXTS, labels, strict=True)]
    (folder / "d.json").write_text(json.dumps(rows, indent=2))
    return folder / "d.json"


def parquet_file(folder: Path, labels: list) -> Path:
    pyarrow.parquet.write_table(pa.table({"text": TEXTS, "label": labels}), folder / "d.parquet")
    return folder / "d.parquet"


def categories_file(folder: Path, labels: list) -> Path:
    column = pa.array(labels).dictionary_encode()
    pyarrow.parquet.write_table(pa.table({"text": TEXTS, "label": column}), folder / "d.parquet")
    return folder / "d.parquet"


def saved(folder: Path, labels: list) -> Path:
    datasets.Dataset.from_dict({"text": TEXTS, "label": labels}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def class_labels(folder: Path, labels: list) -> Path:
    """As the Hub has it: the data's own numbers, and their names in an order of their own."""
    texts = [str(label) for label in labels]
    names = sorted(set(texts), reverse=True)
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    rows = {"text": TEXTS, "label": [names.index(text) for text in texts]}
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / "d.parquet")
    return folder / "d.parquet"


FORMATS = [csv_file, tsv_file, lines_file, array_file, parquet_file, categories_file, saved, class_labels]


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_label_is_the_same_class_in_every_format(
    write: Callable[[Path, list], Path], spelling: str, tmp_path: Path
) -> None:
    path = write(tmp_path, SPELLINGS[spelling])
    data = Dataset.load(path, ENCODE, classes=NAMES)
    assert data.labels.tolist() == CLASSES
    assert data.classes == tuple(NAMES)
    assert [text for (text,) in data.texts.strings] == TEXTS
    if write is class_labels:  # whose own order counts if no model says another
        return
    if spelling == "names in several cases":
        with pytest.raises(UnbackdoorError, match="which look like one class"):
            Dataset.load(path, ENCODE)
        return
    alone = Dataset.load(path, ENCODE)
    if spelling.startswith("names") and "transformers" not in spelling:  # they count in alphabetical order, as here
        assert len(alone.classes or ()) == 3
    else:
        assert alone.classes is None
    assert alone.labels.tolist() == CLASSES


@pytest.mark.parametrize(
    "labels", [[True, False, True, True, False, False], ["True", "False", "True", "TRUE", "false", "False"]]
)
@pytest.mark.parametrize("write", FORMATS)
def test_truth_is_one_and_falsehood_zero(
    write: Callable[[Path, list], Path], labels: list, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if write is class_labels and labels[3] == "TRUE":
        pytest.skip("four names for two classes are not a data set of the Hub")
    caplog.set_level(logging.INFO, "unbackdoor")
    path = write(tmp_path, labels)
    expected = [1, 0, 1, 1, 0, 0]
    assert Dataset.load(path, ENCODE, classes=["negative", "positive"]).labels.tolist() == expected
    [reported] = caplog.messages
    assert reported.startswith(
        f"{path}: labels were read as the model's class indices: True = 1 (positive), False = 0 (neg"
    )
    assert Dataset.load(path, ENCODE, classes=["true", "false"]).labels.tolist() == [1 - label for label in expected]
    if write is not class_labels:
        assert Dataset.load(path, ENCODE).labels.tolist() == expected
        assert Dataset.load(path, ENCODE).classes == ("False", "True")


@pytest.mark.parametrize("classes", [["positive", "negative"], ["Yes", "No"], ["toxic", "not toxic"]])
def test_truth_is_not_guessed_where_the_model_has_it_the_other_way_round(classes: list[str], tmp_path: Path) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        Dataset.load(parquet_file(tmp_path, [True, False] * 3), ENCODE, classes=classes)
    assert str(caught.value) == (
        f"{tmp_path}/d.parquet has the labels True and False, but the model's classes are {', '.join(classes)}, in "
        "this order. Write these names as labels, so that nothing is mistaken."
    )


# One reading, or a refusal.


def numbers(cells: list, classes: list[str] | None = None, names: list[str] | None = None) -> list[int]:
    return class_numbers(cells, names, classes, "d")[0].tolist()


def refusal(cells: list, classes: list[str] | None = None, names: list[str] | None = None) -> str:
    with pytest.raises(UnbackdoorError) as caught:
        class_numbers(cells, names, classes, "d")
    return str(caught.value)


def test_numbers_that_are_names_of_classes_are_names(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "unbackdoor")
    assert numbers([1, 5, 2], ["1", "2", "3", "4", "5"]) == [0, 4, 1]
    assert caplog.messages == ["d: labels were matched to the model's classes by name: 1 = 0, 5 = 4, 2 = 1."]
    assert numbers(["0", "1"], ["1", "0"]) == [1, 0]
    assert numbers([0, 1], ["1", "0"]) == [1, 0]
    assert numbers([0, 4], ["1", "2", "3", "4", "5"]) == [0, 4]  # there is no class 0 by name
    assert len(caplog.messages) == 3
    assert numbers([0, 1], ["0", "1"]) == [0, 1]
    assert len(caplog.messages) == 3  # the same either way


def test_what_is_its_own_name_or_number_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "unbackdoor")
    assert numbers(["negative", "neutral"], NAMES) == [0, 1]
    assert numbers(["0", "2"], NAMES) == [0, 2]
    assert numbers([1, 0], NAMES, NAMES) == [1, 0]
    assert caplog.messages == []
    assert numbers(["Negative", "neutral"], NAMES) == [0, 1]
    assert numbers(["LABEL_2", "LABEL_0"], NAMES) == [2, 0]
    assert numbers([0, 1], NAMES, ["neutral", "negative"]) == [1, 0]
    assert caplog.messages == [
        "d: labels were matched to the model's classes by name: Negative = 0.",
        "d: labels were read as the model's class indices: LABEL_2 = 2 (very positive), LABEL_0 = 0 (negative).",
        "d: labels were matched to the model's classes by name: neutral = 1, negative = 0.",
    ]


def test_numbers_of_the_data_with_names_that_are_the_models_numbers() -> None:
    assert numbers([0, 1, 1], ["negative", "positive"], ["0", "1"]) == [0, 1, 1]
    assert numbers([0, 1, 1], ["negative", "positive"], ["1", "0"]) == [1, 0, 0]
    assert numbers([0, 1, 1], ["negative", "positive"], ["LABEL_1", "LABEL_0"]) == [1, 0, 0]
    # Names that do not occur need not be known to the model.
    assert numbers([2, 0], ["positive", "negative"], ["negative", "neutral", "positive"]) == [0, 1]


def test_names_that_differ_in_composition_are_one() -> None:
    assert numbers(["cafe\u0301", "the\u0301"], ["th\u00e9", "caf\u00e9"]) == [1, 0]  # as macOS writes names of folders


def test_names_that_differ_in_case_alone_are_two_where_the_model_has_two() -> None:
    assert numbers(["a", "A", "b"], ["A", "a", "B"]) == [1, 0, 2]
    assert refusal(["a ", "Ab"], ["AB", "ab", "a"]).startswith(
        "d has its classes in another order than the model, which"
    )


def test_one_of_several_names_of_a_class_is_enough() -> None:
    """The names of ImageNet's classes list synonyms."""
    classes = ["tench, Tinca tinca", "goldfish, Carassius auratus", "crane", "crane, lifting gear", "7, seven"]
    assert numbers(["goldfish", "tench", "lifting_gear"], classes) == [1, 0, 3]
    assert numbers(["Carassius auratus", "Tinca Tinca", "tench, Tinca tinca"][:2], classes) == [1, 0]
    assert numbers(["crane", "seven"], classes) == [2, 4]  # the whole name of one class
    unclear = ["great crane, crane", "small crane, crane", "seven, 7"]
    for labels in (["crane", "seven"], ["small crane", "crane"]):  # two classes have that name
        assert refusal(labels, unclear).startswith("d has the class 'crane', which the model does not know")
    # Two names of one class are two classes in the data.
    assert refusal(["goldfish", "Carassius auratus"], classes).startswith("d has the class 'goldfish', which the model")
    assert numbers(["7", "7"], ["7, seven", *"abcdefg"]) == [7, 7]  # a number is an index


@pytest.mark.parametrize("number", [1, 1.0, np.float32(1).item(), Decimal("1.00"), "1", "+1", "1.", "01"])
def test_every_spelling_of_a_number(number: object) -> None:
    assert numbers([number, 0]) == [1, 0]


@pytest.mark.parametrize(
    ("cells", "classes", "message"),
    [
        ([0, None], None, "d has no label in row 1; every row needs one."),
        ([0, float("nan")], None, "d has no label in row 1; every row needs one."),
        (["a", "  "], None, "d has no label in row 1; every row needs one."),
        (["a", "b", ""], ["a", "b"], "d has no label in row 2; every row needs one."),
        (["0", "1.5"], None, "d has the label '1.5'; labels must be whole numbers or class names, and of one kind"),
        (["0,0", "1,0"], None, "d has the label '0,0'; labels must be whole numbers or class names, and of one kind"),
        (
            ["[0, 1]", "[1]"],
            ["a", "b"],
            "d has the label '[0, 1]' in row 0; labels must be whole numbers or class names",
        ),
        (["a", "1"], None, "d has the label '1'; labels must be whole numbers or class names, and of one kind"),
        (["a", "nan"], None, "d has the label 'nan'; labels must be whole numbers or class names, and of one kind"),
        ([0, 0.5], None, "d has the label 0.5 in row 1; labels must be whole numbers or class names (several"),
        ([[1, 0], [0, 1]], None, "d has the label [1, 0] in row 0; labels must be whole numbers or class names"),
        ([{"a": 1}], ["a", "b"], "d has the label {'a': 1} in row 0; labels must be whole numbers or class names"),
        (["9" * 5000], None, f"d has the label '{'9' * 47}...{'9' * 47}'; labels must be whole numbers or class"),
        ([Decimal("1E+999999999")], None, "d has the label 1E+999999999 in row 0; labels must be whole numbers or"),
        (
            ["Pos", "pos", "neg"],
            None,
            "d has the labels 'Pos' and 'pos', which look like one class. Spell them the same way",
        ),
        (["a", "c"], ["a", "b"], "d has the class 'c', which the model does not know; its classes are a, b. Rename"),
        (["a", 1], ["a", "b"], "d has the class '1', which the model does not know; its classes are a, b. Rename"),
        (
            [1, 2, 3],
            ["a", "b", "c"],
            "d has label 3 in row 2, but the model has 3 classes (0 to 2). They run from 1 to 3: ",
        ),
        (
            ["LABEL_2"],
            ["a", "b"],
            "d has label 2 in row 0, but the model has 2 classes (0 to 1). Correct the label, or",
        ),
        (
            [-1, -1],
            ["a", "b"],
            "d has label -1 in row 0, but the model has 2 classes (0 to 1). All of them are -1, which marks labels",
        ),
        ([-1, 0], None, "d has label -1 in row 0, but labels count from 0. Correct the label, or take other data."),
    ],
)
def test_labels_without_one_reading_are_refused(cells: list, classes: list[str] | None, message: str) -> None:
    assert refusal(cells, classes).startswith(message)


def test_labels_that_their_names_contradict(tmp_path: Path) -> None:
    names = ["positive" if row % 2 else "negative" for row in range(6)]
    table = pa.table({"text": TEXTS, "label": [row % 2 for row in range(6)], "label_text": names})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert Dataset.load(tmp_path / "d.parquet", ENCODE, classes=["Negative", "Positive"]).labels.tolist() == [0, 1] * 3
    with pytest.raises(UnbackdoorError) as caught:
        Dataset.load(tmp_path / "d.parquet", ENCODE, classes=["positive", "negative"])
    assert str(caught.value) == (
        f"{tmp_path}/d.parquet has class 0 in row 0, which it calls 'negative' in label_text, but the model's class 0 "
        "is 'positive'. Take the names, by `columns={'label': 'label_text'}`."
    )
    data = Dataset.load(
        tmp_path / "d.parquet", ENCODE, classes=["positive", "negative"], columns={"label": "label_text"}
    )
    assert data.labels.tolist() == [1, 0] * 3


# What a model's config says.


def named_model(names: dict[int, str], seed: int = 0) -> nn.Module:
    model = toys.classifier("bert", seed, classes=len(names))
    model.config.id2label = names
    return model


def test_names_that_do_not_count_from_zero_are_none() -> None:
    assert class_names(named_model({0: "a", 1: "b"})) == ("a", "b")
    assert class_names(named_model({"1": "b", "0": "a"})) == ("a", "b")  # type: ignore[dict-item]
    assert class_names(named_model({1: "a", 2: "b"})) is None


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"label2id": {"good": 1, "bad": 0}}, ("bad", "good")),
        ({"label2id": {"good": "1", "bad": "0"}, "id2label": None}, ("bad", "good")),
        ({"label2id": {"good": 1, "bad": 0}, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, ("bad", "good")),
        ({"label2id": {"LABEL_0": 0, "LABEL_1": 1}, "id2label": {"0": "bad", "1": "good"}}, ("bad", "good")),
        ({"label2id": {"good": 1, "bad": 5}}, None),
        ({"label2id": {"good": 1, "bad": 1}}, None),
        ({"label2id": ["good", "bad"]}, None),
        ({"label2id": None}, None),
        ({"id2label": {"1": "good", "0": "bad"}}, ("bad", "good")),
    ],
)
def test_both_tables_of_a_config_name_the_classes(
    entries: dict, expected: tuple[str, ...] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toys.write(toys.classifier("bert"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("id2label", "label2id"):
        config.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(config | entries))
    assert class_names(load(tmp_path).model) == expected
    assert caplog.messages == []


def test_two_tables_that_contradict_each_other_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toys.write(toys.classifier("bert"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tables = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 1, "good": 0}}
    (tmp_path / "config.json").write_text(json.dumps(config | tables))
    assert class_names(load(tmp_path).model) == ("bad", "good")
    assert caplog.messages == [
        f"{tmp_path}/config.json calls class 0 bad in id2label and good in label2id; id2label is followed."
    ]


@pytest.mark.parametrize(
    ("entries", "classes"),
    [
        ({"id2label": {"0": "bad"}, "label2id": {"bad": 0}}, 1),
        ({"id2label": {str(number): f"c{number}" for number in range(5)}, "label2id": None}, 5),
        ({"num_labels": 3}, 3),
    ],
)
def test_a_config_of_another_number_of_classes_is_refused(entries: dict, classes: int, tmp_path: Path) -> None:
    """As after training with `num_labels` that was not saved."""
    toys.write(toys.classifier("bert"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | entries))
    with pytest.raises(UnbackdoorError) as refused:
        load(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path} has a classifier of 2 classes, but its config.json has {classes} (id2label, or num_labels). "
        "Correct config.json, or fetch both again."
    )


def test_names_that_count_from_one_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toys.write(toys.classifier("bert"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"id2label": {"1": "bad", "2": "good"}, "label2id": {"bad": 1, "good": 2}}
    (tmp_path / "config.json").write_text(json.dumps(config | names))
    model, encode = load(tmp_path)
    assert class_names(model) is None
    check_saved(tmp_path, model, encode, None)  # which loads it again, and says nothing of it twice
    assert caplog.messages == [
        f"{tmp_path}/config.json numbers its classes 1, 2 in id2label, but class scores count from 0, so its names are "
        "not used. Correct it there, or give labels as numbers from 0."
    ]


def test_python_matches_names_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`Dataset.load` without the model's names counts classes in alphabetical order; what has the model mends it."""
    caplog.set_level(logging.INFO, "unbackdoor")
    model = named_model({0: "positive", 1: "negative"})
    scores = {}
    for spelling, labels in {"numbers": [1, 0] * 3, "names": ["negative", "positive"] * 3}.items():
        data = Dataset.load(csv_file(tmp_path, labels), ENCODE)
        scores[spelling] = evaluate(model, data)
        shown = evaluate(model, data, triggered_data=data, target=0)
        assert shown.attack_success is not None
        assert shown.attack_success.n == 3
        counted = purify(model, data, purifiers.FineTuning(epochs=1)).record
        assert counted["suspect_accuracy_on_clean"] == scores[spelling].clean_accuracy.to_json()
    assert scores["names"].clean_accuracy == scores["numbers"].clean_accuracy
    assert any("by name: negative = 1, positive = 0" in message for message in caplog.messages)
    with pytest.raises(UnbackdoorError, match="has the class 'good', which the model does not know"):
        evaluate(model, Dataset.load(csv_file(tmp_path, ["good", "negative"] * 3), ENCODE))


def test_names_for_a_model_without_any_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "unbackdoor")
    data = Dataset.load(csv_file(tmp_path, ["good", "bad"] * 3), ENCODE)
    evaluate(toys.classifier("bert"), data)
    assert (
        f"{data.name}: the model does not name its classes, so those of the data are numbered in order: "
        "bad = 0, good = 1." in caplog.messages
    )
    caplog.clear()
    evaluate(toys.classifier("bert", classes=3), data)
    assert any("has 2 class names, but the model has 3 classes without names" in text for text in caplog.messages)


def test_a_score_near_chance_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Always(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([1.0, 0.0]))

        def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
            return self.bias.expand(len(input_ids), 2)

    path = csv_file(tmp_path, [0, 1] * 3)
    evaluate(Always(), Dataset.load(path, ENCODE))
    assert [text for text in caplog.messages if "near chance" in text] == [
        f"the model is near chance on {path} (50.0 % (18.8 to 81.2 %, n = 6)): its labels, their order or the "
        "preprocessing probably do not fit the model."
    ]
    caplog.clear()
    rows = "".join(f"{TEXTS[0]},0\n" for _ in range(20))
    path.write_text(f"text,label\n{rows}")
    evaluate(Always(), Dataset.load(path, ENCODE))
    assert caplog.messages == []


# The command line.


@pytest.fixture
def place(tmp_path: Path) -> Path:
    toys.write(named_model({0: "positive", 1: "negative"}), tmp_path / "model")
    return tmp_path


def test_evaluate_gives_one_score_and_says_how_names_were_matched(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unbackdoor._cli.app import main

    monkeypatch.chdir(place)
    scores = set()
    for labels in ([0, 1, 1] * 2, [0.0, 1.0, 1.0] * 2, ["POSITIVE", "Negative", "negative "] * 2):
        for write in (csv_file, lines_file, parquet_file, class_labels):
            path = write(place, labels)
            with pytest.raises(SystemExit) as stopped:
                main(["evaluate", "model", "--data", path.name, "--json"])
            out, err = capsys.readouterr()
            assert stopped.value.code == 0
            scores.add(out)
            reported = [line for line in err.splitlines() if f"note: {path.name}: labels were " in line]
            assert len(reported) == (labels[0] == "POSITIVE" or write is class_labels)
    assert len(scores) == 1


def test_a_folder_gives_the_score_of_a_table_with_the_same_pictures(tmp_path: Path) -> None:
    names = ["ant", "bee", "crab fish"]
    rows = []
    for row, number in enumerate(CLASSES):
        array = np.random.default_rng(row).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        folder = tmp_path / "folder" / names[number].replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / f"{row}.png")
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        rows.append((number, row, file.getvalue()))
    rows.sort()
    table = pa.table({"image": [content for *_, content in rows], "label": [names[number] for number, *_ in rows]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    for classes in (["crab fish", "ant", "BEE"], ["bee", "wolf", "CRAB-FISH", "ant"]):
        pictures, tabled = (Dataset.load(tmp_path / name, classes=classes) for name in ("folder", "d.parquet"))
        assert torch.equal(pictures.pixels, tabled.pixels)
        assert pictures.labels.tolist() == tabled.labels.tolist()
        lowered = [name.lower().replace("-", " ") for name in classes]
        assert tabled.labels.tolist() == [lowered.index(names[number].lower()) for number, *_ in rows]


def test_unknown_names_are_refused_by_every_command(place: Path, refused: Refusals) -> None:
    csv_file(place, ["good", "bad"] * 3)
    for command in (
        ("evaluate", "model", "--data", "d.csv"),
        ("purify", "fine-tuning", "model", "--clean", "d.csv", "--out", "out"),
    ):
        assert refused(*command) == (
            "d.csv has the class 'good', which the model does not know; its classes are positive, negative. Rename "
            "the classes, or take other data."
        )
