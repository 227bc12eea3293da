"""`guard fit`, `guard run` and `guard evaluate` on the command line: what they print and write, and bad input."""

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

from cli.test_audit_command import FACTORY
from commands import Refusals, run
from pictures import write_pictures
from unbackdoor import Dataset

MODEL = ("--factory", "made.py:make", "--mean", "0.3", "--std", "0.37")


@pytest.fixture(scope="module")
def place(backdoored: tuple, digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backdoored model, a guard of it, and examples with and without its trigger."""
    folder = tmp_path_factory.mktemp("guard")
    save_file(backdoored[0].state_dict(), folder / "model.safetensors")
    (folder / "made.py").write_text(FACTORY)
    write_pictures(digits.select(range(1000, 1200)), folder / "clean.parquet")
    test = digits.select(range(1400, 1500))
    write_pictures(test, folder / "test.parquet")
    pixels = test.pixels.clone()
    pixels[:, :, :2, :2] = 255
    write_pictures(Dataset(items=pixels, labels=test.labels, classes=test.classes), folder / "triggered.parquet")
    done = run(
        *("guard", "fit", "strip", "model.safetensors", "--clean", "clean.parquet", "--false-alarms", "0.05"),
        *("--copies", "8", "--out", "guard", *MODEL),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith(
        "An alarm is raised if the entropy over mixed copies in bits is below"
    )
    return folder


def test_the_guard_knows_what_it_was_fitted_with(place: Path) -> None:
    record = json.loads((place / "guard/guard.json").read_text())
    assert record["guard"]["parameters"]["copies"] == 8
    assert record["source"] == {"model": "model.safetensors", "factory": "made.py:make"}
    assert record["command"].startswith("unbackdoor guard fit strip model.safetensors --clean clean.parquet")


def test_a_line_for_each_input(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "decisions.jsonl"
    done = run(
        *("guard", "run", "guard", "--model", "model.safetensors", "--data", "triggered.parquet", "--out", out, *MODEL),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(100))
    assert {*lines[0]} == {"row", "score", "threshold", "action", "reason"}
    rejected = sum(line["action"] == "reject" for line in lines)
    assert rejected > 90
    assert (
        done.stdout
        == f"Wrote {out}: {100 - rejected} pass, {rejected} reject, 0 clean. 8.0 forward passes per input.\n"
    )


def test_a_broken_picture_is_a_line_of_its_own(place: Path, digits: Dataset, tmp_path: Path) -> None:
    """The others are decided about as if it were not there, and have their rows in the data."""
    lines = ["image"]
    for row, pixels in enumerate(digits.pixels[1400:1410]):
        Image.fromarray(pixels[0].numpy()).save(tmp_path / f"{row}.png")
        lines.append(f"{row}.png")
    (tmp_path / "whole.csv").write_text("\n".join(lines) + "\n")
    guard = (
        *("guard", "run", place / "guard", "--model", place / "model.safetensors", "--mean", "0.3", "--std", "0.37"),
        *("--factory", f"{place}/made.py:make", "--data"),
    )
    assert run(*guard, "whole.csv", "--out", "whole.jsonl", cwd=tmp_path).returncode == 0
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:40])  # cut off
    (tmp_path / "7.png").unlink()
    done = run(*guard, "whole.csv", "--out", "broken.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2 of 10 inputs could not be read, and are rejected: see their reasons."
    whole, broken = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("whole", "broken")
    )
    assert [line["row"] for line in broken] == list(range(10))
    assert [line for line in broken if line["row"] not in (3, 7)] == [
        line for line in whole if line["row"] not in (3, 7)
    ]
    for row in (3, 7):
        assert (broken[row]["score"], broken[row]["action"]) == (None, "reject")
    assert broken[3]["reason"].startswith("whole.csv has a picture in row 3, 3.png, that cannot be decoded (")
    assert "7.png" in broken[7]["reason"]


def test_pictures_of_which_none_can_be_read_are_refused(place: Path, refused: Refusals) -> None:
    (place / "gone.csv").write_text("image\ngone.png\nlost.png\n")
    said = refused(
        *("guard", "run", "guard", "--model", "model.safetensors", "--data", "gone.csv", "--out", "new.jsonl", *MODEL)
    )
    assert "gone.png" in said
    assert not (place / "new.jsonl").exists()


def test_the_numbers_of_a_guard(place: Path) -> None:
    done = run(
        *("guard", "evaluate", "guard", "--model", "model.safetensors", "--data", "test.parquet"),
        *("--triggered", "triggered.parquet", "--target", "3", "--json", *MODEL),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    score = json.loads(done.stdout)
    assert score["false_alarms"]["n"] == 100
    assert score["missed_attacks"]["value"] < 0.1 < score["attack_success_without_guard"]["value"]
    assert score["auc"]["low"] < score["auc"]["value"]
    assert score["forwards_per_input"]["value"] == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("guard", "fit", "stripp", "model.safetensors", "--clean", "clean.parquet", "--out", "new"),
            "There is no guard 'stripp'. Did you mean 'strip'? See unbackdoor list guards.",
        ),
        (
            ("guard", "fit", "strip", "model.safetensors", "--clean", "clean.parquet", "--out", "guard", *MODEL),
            "guard exists. Use --overwrite, or another --out.",
        ),
        (
            ("guard", "fit", "strip", "model.safetensors", "--clean", "test.parquet", "--out", "new", *MODEL),
            "fit_guard needs at least 197 clean examples for a share of false alarms of 0.01, since half of them set "
            "the threshold; test.parquet has 100. Add clean examples, or take --false-alarms 0.02.",
        ),
        (
            ("guard", "run", "guard", "--model", "model.safetensors", "--data", "test.parquet", "--out", "", *MODEL),
            "--out must be the name of a file, got an empty one.",
        ),
        (
            *(
                ("guard", "run", "guard", "--model", "model.safetensors", "--data", "test.parquet", "--out", "guard"),
                "--out must be a file, got the folder guard.",
            ),
        ),
        (
            ("guard", "run", "clean.parquet", "--model", "model.safetensors", "--data", "a", "--out", "new", *MODEL),
            "clean.parquet/guard.json does not exist. Check its name.",
        ),
    ],
    ids=["name", "exists", "few", "empty", "folder", "no-guard"],
)
def test_bad_input_is_one_sentence(words: tuple[str, ...], said: str, refused: Refusals) -> None:
    assert refused(*words) == said


def test_another_model_is_refused(place: Path, refused: Refusals, backdoored: tuple, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in backdoored[0].state_dict().items()}
    state["classifier.bias"][0] += 1
    save_file(state, tmp_path / "other.safetensors")
    said = refused(
        *("guard", "run", "guard", "--model", tmp_path / "other.safetensors", "--data", "test.parquet"),
        *("--out", "decisions.jsonl", *MODEL),
    )
    assert said.startswith("The guard was fitted to another model (SHA-256 ")
    assert said.endswith("Give that model in the precision that it had, or fit a guard to this one.")
