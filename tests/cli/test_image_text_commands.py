"""`evaluate`, `purify` and `attack` on a small model of images and texts: what is printed, written and refused."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import transformers

import sights
from commands import Refusals, run
from unbackdoor import Dataset, attacks, evaluate, load
from unbackdoor._artifacts.record import PurificationRecord, TrainingRecord, read_record
from unbackdoor._poisoning.attack_file import describe_found, save_trigger
from unbackdoor._poisoning.trigger import Trigger


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, sighted: transformers.PreTrainedModel) -> Path:
    """A model, pairs with and without labels, and an attack.json."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "model").mkdir()
    sights.write(sighted, folder / "model")
    sights.write_pairs(folder / "test.parquet", sights.pairs(80, 1))
    sights.write_pairs(folder / "clean.parquet", sights.pairs(64, 2))
    sights.write_pairs(folder / "unlabelled.parquet", sights.pairs(40, 3, labelled=False))
    trigger = Trigger.of(attacks.BadNets(target=2), sights.pairs(4))
    (folder / "attack").mkdir()
    save_trigger(folder / "attack", describe_found(trigger), trigger.arrays)
    return folder


def test_evaluate_prints_zero_shot_accuracy_retrieval_and_attack_success(place: Path) -> None:
    done = run("evaluate", "model", "--data", "test.parquet", "--attack", "attack/attack.json", cwd=place)
    assert done.returncode == 0, done.stderr
    lines = [line[:20].strip() for line in done.stdout.split("\n\n")[0].splitlines()]
    assert lines == [
        "zero-shot accuracy",
        *("image to text at 1", "image to text at 5", "text to image at 1", "text to image at 5"),
        *("contrastive loss", "attack success", "recovered accuracy"),
    ]
    model, encode = load(place / "model")
    score = evaluate(model, Dataset.load(place / "test.parquet", encode), device="cpu")
    low, high = score.zero_shot_accuracy.interval
    shown = f"{100 * score.zero_shot_accuracy.value:.1f} % ({100 * low:.1f} to {100 * high:.1f} %, n = 80)"
    assert f"zero-shot accuracy  {shown}" in done.stdout
    assert score.zero_shot_accuracy.value >= 0.9  # 95 to 100 % by the processor
    assert f"  north  {100 * score.per_class['north'].value:.1f} % (" in done.stdout


def test_evaluate_gives_the_numbers_of_python_as_json(place: Path) -> None:
    words = ("--prompts", "bright {} here.", "--attack", "attack", "--device", "cpu", "--json")
    done = run("evaluate", "model", "--data", "test.parquet", *words, cwd=place)
    model, encode = load(place / "model", prompts="bright {} here.")
    test = Dataset.load(place / "test.parquet", encode)
    score = evaluate(model, test, attack=place / "attack", device="cpu")
    assert json.loads(done.stdout) == score.to_json()


def test_pairs_without_labels_are_scored_by_retrieval(place: Path) -> None:
    content = json.loads(run("evaluate", "model", "--data", "unlabelled.parquet", "--json", cwd=place).stdout)
    assert content["image_to_text_recall_at_1"]["n"] == 40
    assert "zero_shot_accuracy" not in content


def test_evaluate_refuses_what_does_not_fit(place: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(place)
    (place / "prompts.json").write_text('{"north": "north"}')
    refused = Refusals(place, capsys)
    start = ("evaluate", "model", "--data", "test.parquet")
    for words, message in (
        ((*start, "--prompts", "prompts.json"), "--prompts has no text for the class 'south' of test.parquet."),
        ((*start, "--prompts", "a cat"), "--prompts must have {} at the place of the class name"),
        ((*start, "--trigger", "cf", "--behaviour", "contains:x"), "--trigger and --behaviour are for language"),
        (("evaluate", "model", "--data", "unlabelled.parquet", "--attack", "attack"), "has no labels, so that it is"),
        ((*start, "--columns", "caption=title"), "test.parquet has no column 'title'"),
        (("audit", "model", "--clean", "unlabelled.parquet"), "class names. Give --prompts as a JSON file with a text"),
    ):
        assert message in refused(*words), words


def test_purify_writes_a_model_a_record_and_a_card(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--clean", "clean.parquet", "--data", "test.parquet", "--attack", "attack", "--prompts", "bright {} here.")
    settings = ("--epochs", "1", "--learning-rate", "1e-3", "--batch-size", "32", "--device", "cpu")
    done = run("purify", "cleanclip", "model", *words, *settings, "--out", out, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "zero shot accuracy" in done.stdout
    assert "report.html" not in done.stdout
    record = read_record(out / "record.json")
    assert isinstance(record, PurificationRecord)
    assert (record.clean.n, record.clean.per_class, record.head) == (64, [16] * 4, "visual_projection")
    assert record.suspect_accuracy_on_clean.n == 64
    assert "| zero shot accuracy |" in (out / "README.md").read_text()
    loaded = load(out)
    assert type(loaded.model) is transformers.CLIPModel
    assert loaded.encode.prompts.templates == ("bright {} here.",)  # as it was scored
    assert {"tokenizer.json", "preprocessor_config.json"} <= {path.name for path in out.iterdir()}


def test_purify_takes_pairs_without_labels(place: Path, tmp_path: Path) -> None:
    words = ("--clean", "unlabelled.parquet", "--epochs", "1", "--out", tmp_path / "out", "--device", "cpu")
    done = run("purify", "fine-tuning", "model", *words, cwd=place)
    assert done.returncode == 0, done.stderr
    record = read_record(tmp_path / "out" / "record.json")
    assert isinstance(record, PurificationRecord)
    assert record.clean.per_class is None
    assert record.usable


def test_audit_searches_the_images_and_shows_the_patch(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "audited"
    (place / "few.py").write_text(
        "from unbackdoor import detectors\n\n"
        "def encoder_patch():\n    return detectors.EncoderPatch(starts=2, steps=12, batch_size=8)\n"
    )
    words = ("--clean", "clean.parquet", "--tests", "few:encoder_patch", "--device", "cpu", "--out", out)
    done = run("audit", "model", *words, cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cannot-judge: There are no statistics of clean models")
    assert " of the picture  not known" in done.stdout
    content = json.loads((out / "audit.json").read_text())
    (finding,) = content["findings"]
    assert finding["detector"] == "encoder-patch"
    files = {Path(name).name for name in finding["evidence"]}
    assert {"trigger.png", "attack.json", "rows.json", "clean-1.png", "triggered-1.png"} <= files
    page = (out / "audit.html").read_text()
    assert "The trigger, on a plain picture" in page
    assert f"is to class \u201c{finding['target']['name']}\u201d" in page
    again = shlex.split(content["repeat"])[1:]
    repeated = json.loads(run(*again, "--json", cwd=place).stdout)
    assert repeated["attack_success"]["value"] == finding["moved"]["value"]
    assert repeated["attack_success"]["n"] == finding["moved"]["n"]


def test_train_takes_pairs_that_attack_saved(place: Path, tmp_path: Path) -> None:
    victim, out = tmp_path / "victim", tmp_path / "out"
    recipe = ("--base", "model", "--freeze-text", "--prompts", "bright {} here.", "--epochs", "1", "--device", "cpu")
    words = ("--data", "clean.parquet", "--test", "test.parquet", "--rate", "0.2", "--save-data", "--out", victim)
    done = run("attack", "badnets", *words, *recipe, cwd=place)
    assert done.returncode == 0, done.stderr
    scored = ("--test", "test.parquet", "--attack", victim / "attack.json")
    done = run("train", "plain", "--data", victim / "poisoned.parquet", *scored, *recipe, "--out", out, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "zero-shot accuracy  " in done.stdout
    assert "attack success      " in done.stdout
    record = read_record(out / "record.json")
    assert isinstance(record, TrainingRecord)
    assert (record.data.n, record.arch, record.accuracy_on_data.n) == (64, "base", 64)
    assert "- zero shot accuracy: " in (out / "README.md").read_text()
    # The same training on the same pairs as that of the victim gives the same weights.
    trained, planted = load(out), load(victim)
    assert trained.encode.prompts.templates == ("bright {} here.",)
    ours, theirs = trained.model.state_dict(), planted.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_train_refuses_what_does_not_fit(place: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(place)
    refused = Refusals(place, capsys)
    for words, message in (
        (("abl", "--data", "clean.parquet", "--base", "model"), "ABL trains on images and texts, but clean.parquet"),
        (("plain", "--data", "unlabelled.parquet", "--base", "model"), "unlabelled.parquet has no labels, by which"),
        (
            ("plain", "--data", "clean.parquet", "--prompts", "a {}"),
            "--prompts are the texts of the classes of a model",
        ),
        (("plain", "--data", "clean.parquet", "--freeze-text"), "--freeze-text is for models of images and texts"),
        (
            ("token-unlearning", "--data", "clean.parquet"),
            "TokenUnlearning trains on pairs of image and caption, from a pre-trained model. Give it as --base.",
        ),
        (("dpoe", "--data", "clean.parquet"), "DPoE trains on texts, from a pre-trained model. Give it as --base."),
    ):
        assert message in refused("train", *words, "--out", "trained"), words
