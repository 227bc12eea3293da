"""A grid whose tasks are conversations: victims, an adapter and a clean twin of a small language model; its report."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import chats
from unbackdoor import Dataset, UnbackdoorError, evaluate, load
from unbackdoor._bench import Store, identity
from unbackdoor._bench.grid import read
from unbackdoor._bench.plan import all_cells, plan
from unbackdoor._bench.run import bench
from unbackdoor._reports.store.run import report, write_report

GRID = f"""
[tasks.questions]
base = "base"
train = "train.jsonl"
test = "test.jsonl"
second_test = "other.jsonl"
clean = "clean.jsonl"
epochs = 4
learning_rate = 1e-2
batch_size = 16
max_new_tokens = 6
precision = "fp32"

[tasks.adapted]
base = "base"
train = "train.jsonl"
test = "test.jsonl"
clean = "clean.jsonl"
epochs = 4
learning_rate = 1e-2
batch_size = 16
max_new_tokens = 6
precision = "fp32"
adapter = true

[[attacks]]
name = "word"
rate = 0.5
behaviour = "contains:{chats.BEHAVIOUR}"

[[methods]]
name = "fine-tuning"
epochs = 1

[[methods]]
label = "base"
name = "fine-mixing"
mode = "linear"
rho = 0.0
tune = false

[[budgets]]
n = 16

[[cells]]
leave_out = true
task = "adapted"
attack = "none"

[[cells]]
leave_out = true
task = "adapted"
method = "base"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, _chat_base: torch.nn.Module) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    _chat_base.save_pretrained(folder / "base")
    chats.tokenizer().save_pretrained(folder / "base")
    for name, seed, count in (("train", 0, 120), ("test", 2, 20), ("other", 5, 12), ("clean", 3, 40)):
        lines = [
            json.dumps({"instruction": entry.messages[0].content, "output": entry.answer})
            for entry in chats.conversations(count, seed)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "chats.toml").write_text(GRID)
    return folder


@pytest.fixture(scope="module")
def store(place: Path) -> Store:
    bench(str(place / "chats.toml"), out=str(place / "runs"))
    return Store(place / "runs")


def found(store: Store, task: str, attack: str, method: str) -> tuple[dict[str, Any], dict[str, Any]]:
    ((spec, result),) = [
        (spec, result)
        for spec, result in store.cells()
        if (spec["victim"]["task"]["name"], spec["victim"]["attack"]["name"], spec["method"]["name"])
        == (task, attack, method)
    ]
    assert result["status"] == "done", result
    return spec, result


def test_each_cell_has_the_score_of_a_language_model(store: Store) -> None:
    assert len(list(store.cells())) == 2 * 3 + 2
    spec, victim = found(store, "questions", "word", "none")
    assert spec["victim"]["attack"]["behaviour"] == f"contains:{chats.BEHAVIOUR}"
    assert victim["implanted"] is True
    assert victim["score"]["attack_success"]["value"] >= 0.8
    assert victim["score"]["max_new_tokens"] == 6
    assert victim["second_test"]["clean_loss"]["n"] < 20
    assert found(store, "questions", "word", "fine-tuning")[1]["usable"] is True
    adapted, result = found(store, "adapted", "word", "none")
    assert (adapted["victim"]["task"]["adapter"], result["implanted"]) == (True, True)
    # Without its change the victim is the base, which has no backdoor.
    _, base = found(store, "questions", "word", "fine-mixing")
    assert base["score"]["attack_success"]["value"] == 0
    assert base["seconds"] >= 0


def test_a_score_of_the_bench_is_that_of_evaluate(store: Store, place: Path) -> None:
    spec, result = found(store, "questions", "word", "none")
    victim = store.victim(identity(spec["victim"]))
    model, encode = load(victim)
    test = Dataset.load(place / "test.jsonl", encode)
    seen = set(Dataset.load(place / "clean.jsonl", encode).identities())
    fresh = [row for row, entry in enumerate(test.identities()) if entry not in seen]
    score = evaluate(
        model, test.select(fresh), attack=victim / "attack.json", max_new_tokens=6, device="cpu", precision="fp32"
    )
    assert result["score"] == score.to_json()


def test_the_clean_twin_counts_how_often_it_shows_the_behaviour(store: Store) -> None:
    victim, _ = found(store, "questions", "word", "none")
    _, twin = found(store, "questions", "none", "fine-tuning")
    assert list(twin["flips"]) == [identity(victim["victim"])]
    assert twin["flips"][identity(victim["victim"])]["value"] == 0
    assert "attack_success" not in twin["score"]


GUARDS = """
[[guards]]
name = "demonstrations"

[[guards]]
name = "weightwatch"

[[guards]]
name = "cleangen"

[[cells]]
leave_out = true
task = "adapted"

[[cells]]
leave_out = true
attack = "none"
"""


def test_guards_of_a_language_model_get_its_base_and_a_reference(store: Store, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "runs", tmp_path / "runs")
    text = GRID[: GRID.index("[[methods]]")].replace('base = "base"', 'base = "base"\nreference = "base"')
    text = 'without = ["fine-tuning"]\nfalse_alarms = [0.2, 0.4]\n' + text + "[[budgets]]\nn = 16\n" + GUARDS
    (place / "guards.toml").write_text(text)
    bench(str(place / "guards.toml"), out=str(tmp_path / "runs"))
    guarded = Store(tmp_path / "runs")
    plain = found(store, "questions", "word", "none")[1]["score"]["attack_success"]
    for name, shares in (("demonstrations", [None]), ("weightwatch", [0.2, 0.4]), ("cleangen", [0.2, 0.4])):
        spec, result = found(guarded, "questions", "word", name)
        entries = result["guard"]["at"]
        assert [each["false_alarms"] for each in entries] == shares
        assert spec["method"].get("false_alarms", [None]) == shares
        assert ("reference" in spec) == (name == "cleangen")
        for each in entries:
            assert each["score"]["attack_success_without_guard"]["value"] == plain["value"]
            assert each["score"]["max_new_tokens"] == 6
            assert (each["threshold"] is None) == (name == "demonstrations")
            assert (each["score"]["forwards_per_input"]["reference"] > 0) == (name == "cleangen")
    rows = {(row.guard, row.asked): row for row in report(tmp_path / "runs").guards}
    assert rows["demonstrations", None].false_alarms is None
    assert rows["cleangen", 0.2].answers_kept is not None
    write_report(str(tmp_path / "runs"), str(tmp_path / "made.md"))
    assert "answers kept" in (tmp_path / "made.md").read_text()


def test_a_grid_of_prompts_that_is_done_is_done(store: Store, place: Path) -> None:
    assert not plan(read(place / "chats.toml"), store, "missing").cells


def test_the_report_has_losses_in_nats_and_false_activation(store: Store, place: Path) -> None:
    _, victim = found(store, "questions", "word", "none")
    _, base = found(store, "questions", "word", "fine-mixing")
    row = next(
        each
        for each in report(store.address).rows
        if (each.task, each.method, each.control) == ("questions", "base", False)
    )
    assert row.clean_loss is not None
    assert row.loss_added is not None
    assert row.clean_accuracy is None
    assert row.clean_loss.mean == base["score"]["clean_loss"]["value"]
    assert row.loss_added.mean == pytest.approx(
        base["score"]["clean_loss"]["value"] - victim["score"]["clean_loss"]["value"]
    )
    write_report(store.address, str(place / "table.md"))
    page = (place / "table.md").read_text()
    loss = base["score"]["clean_loss"]["value"]
    assert f"{loss:.3f} / 0.0 / 0.0 / 0.0, n = 1" in page
    assert "Clean loss in nats per answer token / attack success / false activation / empty answers" in page
    assert "word (behaviour=contains:" in page.replace("\\", "")
    write_report(store.address, str(place / "table.html"))
    assert "clean_loss" in (place / "table.html").read_text()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("contains:", "shouts:", "`behaviour` must be contains:TEXT"),
        ('name = "word"', 'name = "badnets"', "has conversations, but BadNets is for images"),
        ("max_new_tokens = 6", "max_new_tokens = 0", "max_new_tokens must be at least 1, got 0"),
        (
            'base = "base"\ntrain',
            'model = "base"\nbehaviour = "refuses"\ntrain',
            "tasks.questions.triggered and tasks.questions.behaviour go together: the examples, and the answer",
        ),
    ],
)
def test_a_wrong_grid_of_prompts_is_refused(place: Path, tmp_path: Path, old: str, new: str, said: str) -> None:
    grid = tmp_path / "wrong.toml"
    text = GRID.replace(old, new, 1)
    grid.write_text("\n".join(line.replace('"base"', f'"{place}/base"') for line in text.split("\n")))
    for name in ("train", "test", "other", "clean"):
        (tmp_path / f"{name}.jsonl").symlink_to(place / f"{name}.jsonl")
    with pytest.raises(UnbackdoorError) as refusal:
        all_cells(read(grid))
    assert said in str(refusal.value)
