"""`--help` and `list`: what a user needs first stands first."""

import re
from collections.abc import Callable

import pytest

from unbackdoor import purifiers
from unbackdoor._cli.app import main

Shown = Callable[..., str]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shown:
    """Runs a command that only prints, and returns what it printed."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([*arguments])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    return run


def panels(text: str) -> dict[str, list[str]]:
    """The options of a help page by the heading of their panel, in order."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if heading := re.match(r"╭─ (.+?) ─", line):
            options = found.setdefault(heading[1], [])
        elif option := re.match(r"│ (?:\*  |   )?(--\S+)", line):
            options.append(option[1])
    return found


@pytest.mark.parametrize(
    ("command", "headings", "required"),
    [
        (
            ("purify", "fst"),
            ["Arguments", "Required", "Options of fst", "Data", "Model", "Output", "Hardware"],
            ["--out", "--clean"],
        ),
        (
            ("purify", "clp"),
            ["Arguments", "Required", "Options of clp", "Data", "Model", "Output", "Hardware"],
            ["--out"],
        ),
        (
            ("purify", "e-pur+fine-mixing"),
            [
                *("Arguments", "Required", "Options of e-pur", "Options of fine-mixing"),
                *("Data", "Model", "Output", "Hardware"),
            ],
            ["--out", "--base"],
        ),
        (
            ("purify", "module-substitution"),
            [
                *("Arguments", "Required", "Options of module-substitution"),
                *("Data", "Model", "Output", "Hardware"),
            ],
            ["--out", "--clean", "--proxy"],
        ),
        (
            ("attack", "badnets"),
            ["Required", "Options of badnets", "Data", "Model", "Tests", "Training", "Output", "Hardware"],
            ["--data", "--out"],
        ),
        (
            ("attack", "word"),
            ["Required", "Options of word", "Data", "Model", "Tests", "Training", "Output", "Hardware"],
            ["--data", "--out", "--base"],
        ),
        (
            ("train", "abl"),
            ["Required", "Options of abl", "Data", "Model", "Training", "Output", "Hardware"],
            ["--data", "--out"],
        ),
        (
            ("train", "musclelora"),
            ["Required", "Options of musclelora", "Data", "Model", "Training", "Output", "Hardware"],
            ["--data", "--out", "--clean", "--base"],
        ),
        (
            ("guard", "fit", "strip"),
            ["Arguments", "Required", "Options of strip", "Data", "Model", "Output", "Hardware"],
            ["--clean", "--out"],
        ),
        (
            ("guard", "run"),
            ["Arguments", "Required", "Data", "Model", "Output", "Hardware"],
            ["--model", "--data", "--out"],
        ),
        (
            ("guard", "evaluate"),
            ["Arguments", "Required", "Data", "Model", "Output", "Hardware"],
            ["--model", "--data"],
        ),
        (
            ("audit",),
            ["Arguments", "Data", "Model", "Tests", "Output", "Hardware"],
            None,
        ),
        (("evaluate",), ["Arguments", "Required", "Data", "Model", "Output", "Hardware"], ["--data"]),
        (
            ("stress",),
            ["Arguments", "Required", "Data", "Model", "Tests", "Output", "Hardware"],
            ["--victim", "--clean", "--attack"],
        ),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, tuple) else "",
)
def test_required_options_come_first_then_the_own_then_the_shared_ones(
    command: tuple[str, ...], headings: list[str], required: list[str] | None, shown: Shown
) -> None:
    text = shown(*command, "--help")
    found = panels(text)
    assert list(found) == headings
    assert found.get("Required") == required
    options = [option for each in found.values() for option in each]
    assert len(options) == len(set(options))
    box = text.partition("─ Required ─")[2].partition("╰")[0]
    assert re.findall(r"^│ \*  (--\S+)", box, re.MULTILINE) == (required or []), "each has the mark"
    usage = text.partition("\n")[0]
    assert [option for option in required or [] if option not in usage] == []


def test_clean_examples_are_optional_where_nothing_is_tuned(shown: Shown) -> None:
    text = " ".join(shown("purify", "fine-mixing", "--help").replace("│", " ").split())
    assert "saved data set. Needed, unless --rho R --no-tune is given; after e-pur, unless --stream is given" in text
    assert "--clean" in panels(shown("purify", "fine-mixing", "--help"))["Data"]
    assert "--clean" in panels(shown("purify", "fst+fine-mixing", "--help"))["Required"]


def test_methods_are_listed_by_what_a_user_has(shown: Shown) -> None:
    blocks = re.split(r"^With ", shown("list", "methods"), flags=re.MULTILINE)[1:]
    groups = {block.partition("\n")[0]: block.partition("\n")[2] for block in blocks}
    firsts = {heading: re.findall(r"^(\S+)", text, re.MULTILINE) for heading, text in groups.items()}
    images, texts, prompts, pairs, base, nothing = groups
    assert images.startswith("clean images: start with auto or scale-invariant-fst (")
    on_images = [entry.name for entry in purifiers.REGISTRY if entry.name in firsts[images][2:]]
    assert firsts[images] == ["auto", "scale-invariant-fst", *on_images]  # after these the order of the table
    assert texts.startswith("clean texts: start with auto or word-distillation (")
    assert "auto" in groups[texts].partition("and from above:")[2]
    assert firsts[texts][0] == "word-distillation"
    assert "lora-tuning" in firsts[texts]
    assert "fine-tuning" in groups[texts].partition("and from above:")[2]
    assert "neural-cleanse" not in groups[texts]
    assert prompts.startswith("clean prompts and their answers: start with answer-unlearning (")
    assert {"crow", "answer-unlearning"} <= set(firsts[prompts])
    assert "lora-tuning" in groups[prompts].partition("and from above:")[2]
    assert "fst" not in groups[prompts].split()
    assert pairs.startswith("clean pairs of image and caption: start with patch-unlearning (")
    assert firsts[pairs] == ["patch-unlearning", "cleanclip"]
    assert base.startswith("the pre-trained base of the model, or another model for its task: start with mixing-")
    assert set(firsts[base]) >= {"mixing-distillation", "fine-mixing", "e-pur", "module-substitution"}
    assert (nothing, firsts[nothing]) == ("nothing but the model", ["clp"])
    assert sorted(name for each in firsts.values() for name in each) == sorted(
        entry.name for entry in purifiers.REGISTRY
    )


def test_detectors_are_listed_with_what_they_cannot_see(shown: Shown) -> None:
    from unbackdoor._registry.detectors import REGISTRY

    text = shown("list", "detectors")
    assert re.findall(r"^(\S+)", text, re.MULTILINE) == [entry.name for entry in REGISTRY]
    assert text.count("cannot see: ") == len(REGISTRY)
    alone = re.findall(r"^(\S+).*\n(?: .*\n)*? +runs only if --tests names it$", text, re.MULTILINE)
    assert alone == [entry.name for entry in REGISTRY if entry.on_request] == ["pairs"]
