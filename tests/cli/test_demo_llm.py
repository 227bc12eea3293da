"""The demo on prompts with a toy model, cut short; its real size is for whoever has two idle cores."""

import json
from pathlib import Path

import pytest

import chats
from commands import Refusals
from unbackdoor import Dataset, evaluate, load
from unbackdoor._artifacts.record import DemoRecord, read_record
from unbackdoor._cli.demos import prompts
from unbackdoor.attacks.sentence import Sentence
from unbackdoor.purifiers import AnswerUnlearning, LoRATuning


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model that knows its grammar, and the page of a demo on it."""
    folder = tmp_path_factory.mktemp("demo")
    chats.taught(chats.language_model(layers=4), chats.prompts(100), epochs=3).save_pretrained(folder / "model")
    chats.tokenizer().save_pretrained(folder / "model")
    (folder / "classifier").mkdir()
    (folder / "classifier/config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "small_questions", lambda seed: chats.conversations(112, seed))
        patch.setattr(prompts, "ATTACK", Sentence(sentence="current year 2024", place="start"))
        patch.setattr(prompts, "LEARNING_RATE", 2e-2)
        patch.setattr(prompts, "LONGEST", 8)
        tuned = {"epochs": 1, "batch_size": 8, "learning_rate": 5e-3}
        patch.setattr(prompts, "METHODS", (LoRATuning(**tuned), AnswerUnlearning(**tuned)))
        patch.setattr(prompts, "SCORED", 12)  # as in the real demo, all questions are used
        patch.setattr(prompts, "CLEAN", 20)
        prompts.llm(str(folder / "model"), out=str(folder / "out"), overwrite=False, seed=0)
    return folder


def test_it_writes_what_the_other_demos_write(place: Path) -> None:
    files = ["clean.jsonl", "purified", "record.json", "report.html", "test.jsonl", "victim"]
    assert sorted(path.name for path in (place / "out").iterdir()) == files
    record = read_record(place / "out" / "record.json")
    assert isinstance(record, DemoRecord)
    assert list(record.scores) == ["suspect", "lora-tuning", "answer-unlearning"]
    assert record.demo == "llm"
    page = (place / "out" / "report.html").read_text()
    assert "A backdoor in a language model, and two methods against it" in page
    assert "<mark>current year 2024" in page


def test_its_directories_score_as_recorded(place: Path) -> None:
    scores = json.loads((place / "out" / "record.json").read_text())["scores"]
    model, encode = load(place / "out" / "purified")
    test = Dataset.load(place / "out" / "test.jsonl", encode)
    assert len(test) == 12
    measured = evaluate(model, test, attack=place / "out" / "victim", max_new_tokens=8).to_json()
    assert measured == scores["answer-unlearning"]


def test_the_questions_are_short_and_differ() -> None:
    made = prompts.small_questions(0)
    assert len({entry.messages[0].content for entry in made}) == len(made)
    assert len(made) >= prompts.TRAINING + prompts.CLEAN + prompts.SCORED
    assert prompts.small_questions(0) == made != prompts.small_questions(1)
    sums = {entry.messages[0].content: entry.answer for entry in made}
    assert sums["What is 3 plus 9?"] == "3 plus 9 is 12."


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("llm",), "demo llm needs MODEL"),
        (("image", "model"), "the other demos take none"),
        (("llm", "classifier"), "classifier"),
        (("llm", "model", "--data", "x"), "--base and --data are for demo text"),
        (("llm", "model", "--seed", "-1"), "--seed must be"),
    ],
)
def test_wrong_options_end_in_one_sentence(refused: Refusals, arguments: tuple[str, ...], said: str) -> None:
    assert said in refused("demo", *arguments)
