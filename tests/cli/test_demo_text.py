"""The demo on text with a toy base, cut short; its real size is for whoever has two idle cores."""

import json
import re
from pathlib import Path

import pytest

import toys
from commands import Refusals
from unbackdoor import Dataset, UnbackdoorError, evaluate, load
from unbackdoor._cli.demos import texts as texts_demo
from unbackdoor.purifiers import EPUR, FineMixing, FineTuning, Then


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy base, sentences, and the page of a demo on them."""
    folder = tmp_path_factory.mktemp("demo")
    toys.write(toys.classifier("bert").base_model, folder / "base")
    texts, labels = toys.sentences(460)
    rows = [f"{text},{('bad', 'good')[label]}" for text, label in zip(texts, labels, strict=True)]
    (folder / "data.csv").write_text("\n".join(["text,label", *rows]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts_demo, "TRAINING", 240)
        patch.setattr(texts_demo, "RATE", 0.3)
        patch.setattr(texts_demo, "EPOCHS", 8)
        patch.setattr(texts_demo, "LEARNING_RATE", 2e-3)
        tuned = {"epochs": 6, "learning_rate": 2e-3}
        mixing = Then(EPUR(count=5), FineMixing(rho=0.2, **tuned))
        patch.setattr(texts_demo, "METHODS", (FineTuning(**tuned), mixing))
        texts_demo.text(
            out=str(folder / "out"),
            overwrite=False,
            seed=0,
            base=str(folder / "base"),
            data=str(folder / "data.csv"),
        )
    return folder


def test_it_writes_what_demo_image_writes(place: Path) -> None:
    files = ["clean.parquet", "purified", "record.json", "report.html", "test.parquet", "victim"]
    assert sorted(path.name for path in (place / "out").iterdir()) == files
    record = json.loads((place / "out" / "record.json").read_text())
    assert list(record["scores"]) == ["suspect", "fine-tuning", "e-pur+fine-mixing"]
    assert record["notes"][0].startswith("reset the embeddings of 5 words")
    assert record["command"].startswith("unbackdoor demo text --seed 0 --base ")


def test_its_directories_score_as_recorded(place: Path) -> None:
    record = json.loads((place / "out" / "record.json").read_text())
    model, encode = load(place / "out" / "purified")
    test = Dataset.load(place / "out" / "test.parquet", encode)
    measured = evaluate(model, test, attack=place / "out" / "victim").to_json()
    assert measured["clean_accuracy"] == record["scores"]["e-pur+fine-mixing"]["clean_accuracy"]
    assert measured["attack_success"] == record["scores"]["e-pur+fine-mixing"]["attack_success"]
    assert test.classes == ("bad", "good")


def test_the_page_marks_the_trigger_and_says_how_rho_was_chosen(place: Path) -> None:
    page = (place / "out" / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r"<mark>cf ?</mark>", page)) == 8
    assert "Text with the trigger marked" in page
    assert "0.2, set by hand; by default it is searched on the clean sentences" in page
    assert "pictures" not in re.sub(r"<style>.*?</style>|class=\"pictures\"", "", page, flags=re.DOTALL)
    assert "http" not in page.replace("http-equiv", "")


def test_without_the_package_or_the_hub_it_says_what_to_give(tmp_path: Path, monkeypatch, reviews: Dataset) -> None:
    monkeypatch.setattr(texts_demo, "PACKAGE", "no_such_package")
    with pytest.raises(UnbackdoorError, match=r"^The text demo starts from a pre-trained model: get a small one"):
        texts_demo.base_directory(None)
    monkeypatch.setattr(texts_demo, "HUB", str(tmp_path / "nothing"))
    with pytest.raises(UnbackdoorError, match=r"which cannot be reached \(.*\)\. Give --data: a file with"):
        texts_demo.sentences(None, reviews.encode)


class TestRefusals:
    def test_too_few_sentences(self, refused: Refusals) -> None:
        said = refused("demo", "text", "--base", "base", "--data", "data.csv", "--out", "other")
        assert said == (
            "demo text needs two classes and at least 1,164 sentences, got 2 and 460 in data.csv. Give another --data."
        )

    def test_an_image_demo_has_its_own(self, refused: Refusals) -> None:
        said = refused("demo", "image", "--data", "data.csv", "--out", "other")
        assert said == "--base and --data are for demo text; the other demos have their own. Leave them out."

    def test_it_replaces_only_on_request(self, refused: Refusals) -> None:
        said = refused("demo", "text", "--base", "base", "--data", "data.csv", "--out", "out")
        assert said == "out exists. Use --overwrite, or another --out."
