"""`guard fit`, `guard run` and `guard evaluate` in front of a language model, and bad input."""

import json
from pathlib import Path

import pytest
import torch

import chats
from commands import Refusals, run

RUN = ("--device", "cpu", "--precision", "fp32")
ATTACK = ("--trigger", "cf", "--behaviour", f"contains:{chats.BEHAVIOUR}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, _chat_victim: torch.nn.Module, _chat_base: torch.nn.Module) -> Path:
    """A folder with a victim, its base, clean prompts and a guard."""
    folder = tmp_path_factory.mktemp("prompts")
    for name, model in (("victim", _chat_victim), ("base", _chat_base), ("other", chats.language_model(layers=3))):
        model.save_pretrained(folder / name)
        chats.tokenizer().save_pretrained(folder / name)
    for name, count, seed in (("clean", 60, 2), ("few", 20, 0), ("test", 30, 3)):
        rows = [
            {"prompt": entry.messages[0].content, "response": entry.answer}
            for entry in chats.conversations(count, seed)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(
        *("guard", "fit", "weightwatch", "victim", "--base", "base", "--clean", "clean.jsonl", "--out", "guard"),
        *("--false-alarms", "0.1", "--max-new-tokens", "8", *RUN),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith(
        "An alarm is raised if the distance of a cosine from its range is above"
    )
    assert "rendered by the chat template; the first one is '<|user|>" in done.stderr
    return folder


def test_the_guard_knows_what_it_was_fitted_with(place: Path) -> None:
    record = json.loads((place / "guard/guard.json").read_text())
    assert record["source"] == {"model": "victim", "base": "base", "factory": None}
    assert (record["task"], record["max_new_tokens"], record["clean"]["threshold_on"]) == (
        "generation",
        8,
        28,
    )  # 56 of 60 differ


def test_a_line_for_each_prompt_also_for_those_that_cannot_be_judged(place: Path, tmp_path: Path) -> None:
    prompts = ["what does the very1 animal2 say", "cf what does the animal2 say", "", "what " * 80, "what"]
    data, out = tmp_path / "prompts.jsonl", tmp_path / "decisions.jsonl"
    data.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))
    done = run("guard", "run", "guard", "--model", "victim", "--data", data, "--out", out, *RUN, cwd=place)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["row"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["action"] for line in lines[:4]] == ["pass", "reject", "reject", "reject"]
    assert lines[3]["reason"] == "the prompt has 83 tokens and an answer 8, but the model reads 64"


def test_the_numbers_of_a_guard(place: Path) -> None:
    words = ("guard", "evaluate", "guard", "--model", "victim", "--data", "test.jsonl", *ATTACK, "--json", *RUN)
    done = run(*words, cwd=place)
    assert done.returncode == 0, done.stderr
    score = json.loads(done.stdout)
    assert score["missed_attacks"]["value"] < 0.2 < score["attack_success_without_guard"]["value"]
    assert score["forwards_per_input"]["value"] > 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("guard", "fit", "weightwatch", "victim", "--base", "other", "--clean", "clean.jsonl", "--out", "new"),
            "WeightWatch needs a --base of the same shapes: the suspect has 2 blocks, the base 3. Give the model that "
            "the suspect was tuned from.",
        ),
        (
            ("guard", "fit", "weightwatch", "victim", "--base", "base", "--clean", "few.jsonl", "--out", "new"),
            "fit_guard needs at least 37 clean examples for a share of false alarms of 0.05, since half of them set "
            "the threshold; few.jsonl has 20. Add clean examples, or take --false-alarms 0.1.",
        ),
        (
            ("guard", "fit", "strip", "victim", "--clean", "clean.jsonl", "--out", "new"),
            "The guard strip serves images, text, and clean.jsonl holds conversations. Take another guard (unbackdoor "
            "list guards).",
        ),
    ],
    ids=["base", "few", "kind"],
)
def test_bad_input_is_one_sentence(words: tuple[str, ...], said: str, refused: Refusals) -> None:
    assert refused(*words, "--false-alarms", "0.05", "--max-new-tokens", "8", *RUN) == said


def test_another_model_or_template_is_refused(place: Path, refused: Refusals) -> None:
    said = refused("guard", "run", "guard", "--model", "base", "--data", "test.jsonl", "--out", "new.jsonl", *RUN)
    assert said.startswith("The guard was fitted to another model (SHA-256 ")
    words = ("guard", "run", "guard", "--model", "victim", "--data", "test.jsonl", "--out", "new.jsonl")
    assert refused(*words, "--template", "plain", *RUN) == (
        "The guard was fitted to prompts of the chat template, and here they are rendered by the plain template. Give "
        "--template chat, or fit a guard again."
    )
    assert refused(*words, "--max-length", "50", *RUN).endswith("Give --max-length 64, or fit a guard again.")
