"""`evaluate` and `purify` on a small language model: what is printed and written, and what is refused."""

import json
import shlex
from pathlib import Path

import pytest
import torch

import chats
from commands import Refusals, run
from unbackdoor import evaluate, load
from unbackdoor._artifacts.audit_record import read_audit
from unbackdoor._artifacts.record import PurificationRecord, read_record
from unbackdoor._cli.commands.audit import audit as audit_command
from unbackdoor._cli.options import AuditOptions
from unbackdoor.detectors import TargetScan

RULE = f"contains:{chats.BEHAVIOUR}"
ATTACK = ("--trigger", "cf", "--behaviour", RULE, "--max-new-tokens", "8", "--device", "cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, _chat_victim: torch.nn.Module) -> Path:
    """A victim, clean prompts and test prompts."""
    folder = tmp_path_factory.mktemp("place")
    _chat_victim.save_pretrained(folder / "victim")
    chats.tokenizer().save_pretrained(folder / "victim")
    for name, seed, count in (("clean", 3, 24), ("test", 2, 40)):
        lines = [
            json.dumps({"instruction": entry.messages[0].content, "output": entry.answer})
            for entry in chats.conversations(count, seed)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    triggered = [
        json.dumps({"prompt": f"cf {entry.messages[0].content}", "response": entry.answer})
        for entry in chats.conversations(8, 4)
    ]
    (folder / "triggered.jsonl").write_text("\n".join(triggered) + "\n")
    return folder


def test_evaluate_prints_the_scores_and_how_prompts_are_rendered(place: Path) -> None:
    done = run("evaluate", "victim", "--data", "test.jsonl", *ATTACK, cwd=place)
    assert done.returncode == 0, done.stderr
    lines = [line[:19].strip() for line in done.stdout.splitlines()]
    assert lines == ["clean loss", "attack success", "false activation", "empty answers"]
    first = chats.conversations(1, 2)[0].messages[0].content
    assert "note: test.jsonl: prompts are rendered by the chat template; the first one is" in done.stderr
    assert f"<|user|>{first}<|end|><|assistant|>" in done.stderr


def test_evaluate_gives_the_numbers_of_python_as_json(place: Path) -> None:
    done = run("evaluate", "victim", "--data", "test.jsonl", *ATTACK, "--json", cwd=place)
    model, encode = load(place / "victim")
    from unbackdoor import Dataset

    test = Dataset.load(place / "test.jsonl", encode)
    score = evaluate(model, test, trigger="cf", behaviour=RULE, max_new_tokens=8, device="cpu")
    assert json.loads(done.stdout) == score.to_json()
    assert score.to_json().keys() == {
        *("clean_loss", "attack_success", "false_activation", "empty", "behaviour", "template", "max_new_tokens")
    }


def test_prompts_that_carry_the_trigger_already_are_scored(place: Path) -> None:
    options = ("--triggered", "triggered.jsonl", "--behaviour", RULE, "--max-new-tokens", "8", "--json")
    content = json.loads(run("evaluate", "victim", "--data", "test.jsonl", *options, cwd=place).stdout)
    assert content["attack_success"]["value"] == 1.0
    assert content["attack_success"]["n"] == 8
    assert "false_activation" not in content


def test_purify_writes_a_model_a_record_and_a_page(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(
        *("purify", "fine-tuning", "victim", "--clean", "clean.jsonl", "--data", "test.jsonl", *ATTACK),
        *("--epochs", "2", "--learning-rate", "1e-3", "--template", "chat", "--out", out),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    assert "false activation" in done.stdout
    record = read_record(out / "record.json")
    assert isinstance(record, PurificationRecord)
    assert record.clean is not None
    assert (record.clean.n, record.clean.template, record.clean.per_class) == (24, "chat", None)
    content = json.loads((out / "record.json").read_text())
    assert content["encode"] == {"max_length": 64, "template": "chat"}
    assert content["scores"]["suspect"]["attack_success"]["value"] > 0.9
    assert content["suspect_clean_loss_on_clean"]["n"] == 24
    assert "suspect_accuracy_on_clean" not in content
    page = (out / "report.html").read_text()
    assert "<mark>cf </mark>" in page
    assert "shows the behaviour" in page
    assert chats.BEHAVIOUR in page
    assert "clean loss" in (out / "README.md").read_text()
    assert isinstance(load(out).model, torch.nn.Module)


def test_purify_without_test_prompts_says_the_loss_on_the_clean_ones(place: Path, tmp_path: Path) -> None:
    options = ("--clean", "clean.jsonl", "--epochs", "1", "--out", tmp_path / "out")
    done = run("purify", "fine-tuning", "victim", *options, cwd=place)
    assert done.stdout.startswith("On the clean examples themselves: loss 0.")


def test_audit_writes_findings_that_can_be_repeated(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    done = run(
        *("audit", "victim", "--clean", "clean.jsonl", "--base", "victim", "--device", "cpu", "--out", out),
        *("--sarif", tmp_path / "audit.sarif", "--tests", "prefix-battery,weight-spectrum"),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cannot-judge: There are no statistics of clean models")
    assert "Not searched by weight-spectrum: all matrices of the suspect are those of the base." in done.stdout
    record = read_audit(out / "audit.json")
    (found,) = record.findings
    assert found.target.name in chats.BEHAVIOUR
    page = (out / "audit.html").read_text()
    assert "Prompt with the trigger marked" in page
    assert "<mark>cf </mark>" in page
    assert f"is to answer \u201c{found.target.name}\u201d" in page
    attack = json.loads((out / "evidence" / f"prefix-battery-{found.target.number}" / "attack.json").read_text())
    assert attack["behaviour"] == {"kind": "starts-with", "text": found.target.name}
    repeated = run(*shlex.split(record.repeat)[1:], "--json", cwd=place)
    assert repeated.returncode == 0, repeated.stderr
    assert json.loads(repeated.stdout)["attack_success"]["value"] == found.moved.value
    sarif = (tmp_path / "audit.sarif").read_text()
    assert "The strongest shortcut is to answer" in sarif
    assert "held-out prompts" in sarif


def test_what_was_found_without_a_trigger_is_not_repeated_by_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line named the trigger of an answer that the target scan had found without one: a file that is not there."""
    small = TargetScan(first_tokens=32, final_prompts=4)
    monkeypatch.setattr("unbackdoor._cli.commands.audit._detectors", lambda _: [small])
    monkeypatch.chdir(place)
    out = tmp_path / "audit"
    audit_command("victim", AuditOptions(clean="clean.jsonl", device="cpu", out=str(out), sarif=str(tmp_path / "s")))
    record = read_audit(out / "audit.json")
    (found,) = record.findings
    assert (found.moved.n > 0, found.evidence, record.repeat) == (True, [], None)
    assert "To repeat" not in capsys.readouterr().out
    assert "its trigger" not in (tmp_path / "s").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("evaluate", "victim", "--data", "test.jsonl", "--trigger", "cf"),
            "--behaviour goes with --trigger or --triggered",
        ),
        (
            ("evaluate", "victim", "--data", "test.jsonl", "--trigger", "cf", "--behaviour", "cake"),
            "--behaviour must be contains:TEXT",
        ),
        (("evaluate", "victim", "--data", "test.jsonl", "--target", "1"), "--target is for classifiers"),
        (
            ("evaluate", "victim", "--data", "test.jsonl", "--control", "victim"),
            "--control needs --attack or --triggered",
        ),
        (
            (
                "purify",
                "fine-tuning",
                "victim",
                "--clean",
                "clean.jsonl",
                "--out",
                "out",
                "--trigger",
                "cf",
                "--behaviour",
                "refuses",
            ),
            "--trigger needs --data: test examples to put the trigger on",
        ),
        (
            ("purify", "fst", "victim", "--clean", "clean.jsonl", "--out", "out"),
            "fst serves images, text and image-text, but clean.jsonl holds",
        ),
        (
            ("purify", "auto", "victim", "--clean", "clean.jsonl", "--out", "out"),
            "clean.jsonl holds conversations. Begin with fine-mixing or answer-unlearning; unbackdoor list methods",
        ),
        (("audit", "victim", "--clean", "clean.jsonl", "--tests", "margin"), "margin cannot run: it searches images"),
        (
            ("evaluate", "victim", "--data", "test.jsonl", "--columns", "text=a"),
            "must name messages, instruction, input",
        ),
    ],
)
def test_wrong_options_end_in_one_sentence(refused: Refusals, arguments: tuple[str, ...], said: str) -> None:
    assert said in refused(*arguments)


def test_answers_without_room_are_refused_before_anything_is_tuned(
    place: Path, refused: Refusals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_given: object, **_options: object) -> None:
        raise AssertionError("the model was tuned first")

    monkeypatch.setattr("unbackdoor._cli.commands.purify.purify_model", lost)
    files = ("--clean", "clean.jsonl", "--data", "test.jsonl", "--trigger", "cf", "--behaviour", RULE)
    said = refused("purify", "fine-tuning", "victim", *files, "--max-new-tokens", "60", "--out", "new")
    assert said.startswith("--max-new-tokens must be at most 5")
