"""Pairs of image and caption: how they are read, selected and encoded, and the texts that stand for their classes."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import sights
from unbackdoor import Dataset, UnbackdoorError
from unbackdoor._data.class_prompts import ClassPrompts
from unbackdoor._data.pair_encoder import PairTokens


def picture(path: Path, level: int) -> None:
    Image.new("L", (sights.SIDE, sights.SIDE), level).save(path)


def refused(source: Path, **options: object) -> str:
    with pytest.raises(UnbackdoorError) as problem:
        Dataset.load(source, sights.encoder(), **options)
    return str(problem.value)


def test_pairs_come_back_from_a_table(tmp_path: Path) -> None:
    data = sights.pairs(12)
    read = Dataset.load(sights.write_pairs(tmp_path / "pairs.parquet", data), sights.encoder())
    assert read.modality == "image-text"
    assert read.identities() == data.identities()
    assert (read.labels.tolist(), read.classes) == (data.labels.tolist(), sights.CLASSES)
    assert read.shape == (1, sights.SIDE, sights.SIDE)


def test_a_folder_of_pictures_with_a_table_of_captions_is_read_without_labels(tmp_path: Path) -> None:
    for number, level in enumerate((10, 200)):
        picture(tmp_path / f"{number}.png", level)
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,bright north here.\n0.png,a photo of the dark .\n")
    read = Dataset.load(tmp_path, sights.encoder())
    assert read.pairs.images[:, 0, 0, 0].tolist() == [200, 10]
    assert [caption for (caption,) in read.pairs.captions.strings] == ["bright north here.", "a photo of the dark ."]
    assert read.labels.tolist() == [-1, -1]
    assert not read.has_labels


def test_other_names_of_columns(tmp_path: Path) -> None:
    picture(tmp_path / "one.png", 3)
    row = {"picture": "one.png", "title": "a photo", "side": "north"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    columns = {"image": "picture", "caption": "title", "label": "side"}
    read = Dataset.load(tmp_path / "pairs.jsonl", sights.encoder(), columns=columns, classes=sights.CLASSES)
    assert (read.labels.tolist(), read.pairs.captions.strings) == ([0], (("a photo",),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,label\none.png,0\n", "has images without captions; it has image, label. The model takes pairs of both"),
        (
            "caption,label\na photo,0\n",
            "has texts without images; it has caption, label. The model takes pairs of both",
        ),
        (
            "filepath,title\none.png,a photo\n",
            "has no columns of images and captions; it has filepath, title. Name them by "
            "`columns={'image': 'NAME', 'caption': 'NAME'}`, or take data with pairs.",
        ),
        ("image,caption\none.png,\n", "has no text in row 0 of caption. Repair or remove that row."),
        ("image,caption,label\none.png,a photo,\n", "has no label in row 0; every row needs one."),
    ],
)
def test_rows_that_are_no_pairs_are_refused(content: str, message: str, tmp_path: Path) -> None:
    picture(tmp_path / "one.png", 3)
    (tmp_path / "pairs.csv").write_text(content)
    assert message in refused(tmp_path / "pairs.csv")


def test_a_model_of_both_takes_no_classes_of_pictures(tmp_path: Path) -> None:
    for name in sights.CLASSES:
        (tmp_path / name).mkdir()
        picture(tmp_path / name / "one.png", 3)
    assert "has images without captions; it has image, label." in refused(tmp_path)


def test_captions_in_files_next_to_their_pictures_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "one.png", 3)
    (tmp_path / "one.txt").write_text("a photo")
    assert refused(tmp_path).endswith("Captions belong into a metadata.csv with the columns file_name and caption.")


def test_a_batch_has_the_images_and_the_tokens_of_their_captions() -> None:
    data = sights.pairs(10)
    inputs = data.inputs(torch.tensor([7, 2]))
    assert isinstance(inputs, PairTokens)
    assert len(inputs) == 2
    pixels = data.pairs.images[torch.tensor([7, 2])].float() / 255
    assert torch.allclose(inputs.pixels, (pixels - 0.5) / 0.5, atol=1e-6)
    tokenizer = sights.tokenizer()
    texts = tokenizer([data.pairs.captions.strings[row][0] for row in (7, 2)], padding=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], texts["input_ids"])
    assert torch.equal(inputs.captions["attention_mask"], texts["attention_mask"])


def test_pairs_stay_together_when_they_are_selected_joined_and_replaced() -> None:
    data = sights.pairs(8)
    some = data.select([5, 1])
    assert some.identities() == [data.identities()[5], data.identities()[1]]
    assert some.joined(data).identities() == [*some.identities(), *data.identities()]
    changed = data.replaced(torch.tensor([0, 3]), some.pairs)
    assert [changed.identities()[row] for row in (0, 3)] == some.identities()
    assert changed.identities()[4] == data.identities()[4]


def test_augmentation_changes_images_alone() -> None:
    data = sights.pairs(8).distorted().augmented(torch.Generator().manual_seed(0))
    assert not torch.equal(data.pairs.images, sights.pairs(8).pairs.images)
    assert data.pairs.captions.strings == sights.pairs(8).pairs.captions.strings


def test_prompts_of_a_template_have_the_names_of_the_classes() -> None:
    prompts = ClassPrompts.of("a drawing of a {}!")
    assert prompts.of_classes(("cat", "sea_horse"), 2, "data") == [
        ("a drawing of a cat!",),
        ("a drawing of a sea horse!",),
    ]
    assert ClassPrompts.of(None).of_classes(("cat",), 1, "data") == [("a photo of a cat.",)]


def test_prompts_of_a_file_are_found_by_the_name_of_the_class(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps({"Sea-Horse": ["a fish", "a swimmer"], "cat": "a pet"}))
    prompts = ClassPrompts.of(tmp_path / "prompts.json")
    assert prompts.of_classes(("cat", "sea horse"), 2, "data") == [("a pet",), ("a fish", "a swimmer")]
    assert ClassPrompts.recorded(prompts.to_json()) == prompts
    assert ClassPrompts.recorded({"templates": 3}) == ClassPrompts()


def test_a_file_may_hold_a_list_of_templates(tmp_path: Path) -> None:
    (tmp_path / "templates.json").write_text('["a photo of a {}.", "art of the {}."]')
    prompts = ClassPrompts.of(tmp_path / "templates.json")
    assert prompts.of_classes(("cat", "big_dog"), 2, "data")[1] == ("a photo of a big dog.", "art of the big dog.")
    assert ClassPrompts.recorded(prompts.to_json()) == prompts
    for content, wrong in (('["a {}", "a cat"]', "'a cat'"), ("[]", "''"), ("[1]", "'1'|1")):
        (tmp_path / "templates.json").write_text(content)
        with pytest.raises(
            UnbackdoorError, match=rf"templates\.json must be a JSON list of texts with .*, got {wrong} in"
        ):
            ClassPrompts.of(tmp_path / "templates.json")


def test_prompts_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text('{"cat": "a pet"}')
    (tmp_path / "other.json").write_text('{"cat": 3}')
    (tmp_path / "empty.json").write_text("{}")
    prompts = ClassPrompts.of(tmp_path / "prompts.json")
    for call, message in (
        (lambda: ClassPrompts.of("a cat"), "`prompts` must have {} at the place of the class name, as in"),
        (lambda: ClassPrompts.of(tmp_path / "other.json"), "must have a text, or a list of texts, for the class cat."),
        (lambda: ClassPrompts.of(tmp_path / "empty.json"), "must be a JSON object with a text for each class"),
        (lambda: prompts.of_classes(("cat", "dog"), 2, "data"), "`prompts` has no text for the class 'dog' of data."),
        (lambda: ClassPrompts().of_classes(None, 3, "data"), "data has no name for class 0, so that a template makes"),
    ):
        with pytest.raises(UnbackdoorError) as problem:
            call()
        assert message in str(problem.value)
