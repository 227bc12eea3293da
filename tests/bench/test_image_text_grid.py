"""A grid whose tasks are pairs of image and caption: victims, methods, a trainer and an audit of them; its report."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sights
from unbackdoor import Dataset, UnbackdoorError, evaluate, load
from unbackdoor._bench import Store, identity
from unbackdoor._bench.grid import read
from unbackdoor._bench.plan import all_cells, plan
from unbackdoor._bench.run import bench
from unbackdoor._errors import IncompleteError
from unbackdoor._reports.store.run import report, write_report

GRID = """
[tasks.sights]
base = "base"
train = "train.parquet"
test = "test.parquet"
held_out = 80
augment = "none"
prompts = "a picture of the {}."
freeze_text = true
epochs = 15
learning_rate = 5e-3
batch_size = 16
precision = "fp32"

[[attacks]]
name = "badnets"
target = 2
size = 6
rate = 0.3

[[methods]]
name = "fine-tuning"
epochs = 1

[[methods]]
name = "cleanclip"
epochs = 1

[[methods]]
name = "fst"
epochs = 1

[[trainers]]
name = "token-unlearning"

[[detectors]]
name = "encoder-patch"
steps = 20
starts = 2

[[budgets]]
n = 64
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, sighted: torch.nn.Module) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    sights.write(sighted, folder / "base")
    sights.write_pairs(folder / "train.parquet", sights.pairs(200))
    sights.write_pairs(folder / "test.parquet", sights.pairs(140, 5))
    (folder / "pairs.toml").write_text(GRID)
    return folder


@pytest.fixture(scope="module")
def store(place: Path) -> Store:
    bench(str(place / "pairs.toml"), out=str(place / "runs"))
    return Store(place / "runs")


def found(store: Store, attack: str, method: str) -> tuple[dict[str, Any], dict[str, Any]]:
    ((spec, result),) = [
        (spec, result)
        for spec, result in store.cells()
        if (spec["victim"]["attack"]["name"], spec["method"]["name"]) == (attack, method)
    ]
    assert result["status"] == "done", result
    return spec, result


def test_each_cell_has_the_score_of_a_model_of_images_and_texts(store: Store) -> None:
    assert len(list(store.cells())) == 2 * 6
    spec, victim = found(store, "badnets", "none")
    assert spec["victim"]["task"]["freeze_text"] is True
    assert victim["implanted"] is True
    assert victim["score"]["zero_shot_accuracy"]["n"] == 60
    assert victim["score"]["attack_success"]["value"] >= 0.9
    assert {"image_to_text_recall_at_1", "contrastive_loss"} <= set(victim["score"])
    for method in ("fine-tuning", "cleanclip"):
        _, result = found(store, "badnets", method)
        assert result["score"]["zero_shot_accuracy"]["value"] > 0.9
        assert result["usable"] is True
    # A projection that is drawn anew and tuned for an epoch knows nothing.
    _, shifted = found(store, "badnets", "fst")
    assert (shifted["usable"], shifted["warnings"] != []) == (False, True)
    _, trained = found(store, "badnets", "token-unlearning")
    assert trained["distrusted"]["share"]["n"] == 200
    assert found(store, "badnets", "audit")[1]["audit"]["findings"][0]["detector"] == "encoder-patch"


def test_a_score_of_the_bench_is_that_of_evaluate_with_the_same_prompts(store: Store, place: Path) -> None:
    spec, result = found(store, "badnets", "none")
    victim = store.victim(identity(spec["victim"]))
    model, encode = load(victim)
    assert encode.prompts.templates == ("a picture of the {}.",)
    (held_out,) = [
        content["rows"]
        for path in (place / "runs" / "rows").iterdir()
        if (content := json.loads(path.read_text()))["spec"]["draw"] == "held out"
    ]
    test = Dataset.load(place / "test.parquet", encode, classes=sights.CLASSES)
    rest = test.select([row for row in range(len(test)) if row not in held_out])
    score = evaluate(model, rest, attack=victim / "attack.json", device="cpu", precision="fp32")
    assert result["score"] == score.to_json()


def test_the_control_counts_how_often_it_follows_the_trigger(store: Store) -> None:
    victim, _ = found(store, "badnets", "none")
    _, control = found(store, "none", "cleanclip")
    assert control["flips"][identity(victim["victim"])]["value"] < 0.3
    assert "attack_success" not in control["score"]


def test_a_grid_of_pairs_that_is_done_is_done(store: Store, place: Path) -> None:
    assert not plan(read(place / "pairs.toml"), store, "missing").cells


def test_other_prompts_make_other_cells_wherever_they_are_written(place: Path) -> None:
    (place / "prompts.json").write_text(json.dumps(["a photo of a {}."]))
    keys = {}
    for prompts in ("a picture of the {}.", "a photo of a {}.", "prompts.json"):
        grid = place / "others.toml"
        grid.write_text(GRID.replace('prompts = "a picture of the {}."', f'prompts = "{prompts}"'))
        keys[prompts] = {cell.key for cell in all_cells(read(grid))}
    assert keys["a photo of a {}."] == keys["prompts.json"]
    assert not keys["a photo of a {}."] & keys["a picture of the {}."]


def test_an_existing_model_is_scored_by_the_prompts_of_its_task(store: Store, place: Path) -> None:
    spec, result = found(store, "badnets", "none")
    (place / "victim").symlink_to(store.victim(identity(spec["victim"])))
    (place / "existing.toml").write_text(
        'without = ["clean"]\n[tasks.existing]\nmodel = "victim"\ntest = "test.parquet"\nheld_out = 80\n'
        'prompts = "a photo of a {}."\nprecision = "fp32"\n[[methods]]\nname = "cleanclip"\nepochs = 1\n'
        "[[budgets]]\nn = 64\n"
    )
    bench(str(place / "existing.toml"), out=str(place / "others"))
    existing = Store(place / "others")
    _, score = found(existing, "badnets", "none")
    assert score["implanted"] is True
    assert score["score"]["contrastive_loss"] == result["score"]["contrastive_loss"]
    assert found(existing, "badnets", "fine-tuning")[1]["usable"] is not None


def test_test_pairs_need_labels(store: Store, place: Path) -> None:
    spec, _ = found(store, "badnets", "none")
    (place / "bare").symlink_to(store.victim(identity(spec["victim"])))
    sights.write_pairs(place / "unlabelled.parquet", sights.pairs(40, 7, labelled=False))
    (place / "unlabelled.toml").write_text(
        'without = ["clean"]\n[tasks.bare]\nmodel = "bare"\ntest = "unlabelled.parquet"\nclean = "train.parquet"\n'
        'triggered = "test.parquet"\ntarget = 2\n[[budgets]]\nn = 64\n'
    )
    with pytest.raises(
        IncompleteError, match=r"unlabelled\.parquet has no labels, so that it is not known which images"
    ):
        bench(str(place / "unlabelled.toml"), out=str(place / "unlabelled"))


def test_the_report_says_that_its_accuracy_is_zero_shot(store: Store, place: Path) -> None:
    _, cleaned = found(store, "badnets", "cleanclip")
    row = next(
        each for each in report(store.address).rows if (each.method, each.control) == ("cleanclip (epochs=1)", False)
    )
    assert row.zero_shot
    assert row.clean_accuracy.mean == cleaned["score"]["zero_shot_accuracy"]["value"]
    assert row.attack_success.mean == cleaned["score"]["attack_success"]["value"]
    assert row.clean_n == 60
    write_report(store.address, str(place / "table.md"))
    assert "Zero-shot accuracy / attack success in %" in (place / "table.md").read_text()
    write_report(store.address, str(place / "table.json"))
    assert all(line["zero_shot"] for line in json.loads((place / "table.json").read_text())["rows"])
    write_report(store.address, str(place / "table.html"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "badnets"\ntarget = 2\nsize = 6', 'name = "sig"', "has image-text, but SIG is for images"),
        ('name = "cleanclip"', 'name = "linear-probing"', "has image-text, but LinearProbing is for images and text"),
        ('name = "token-unlearning"', 'name = "abl"', "has image-text, but ABL is for images"),
        ('prompts = "a picture of the {}."', 'prompts = "a picture"', "`prompts` must have {} at the place of"),
        ("freeze_text = true", "freeze_text = 1", "freeze_text must be"),
        ("epochs = 15", "lora_rank = 4", "tasks.sights.lora_rank is for language models, but the task has image-text"),
    ],
)
def test_a_wrong_grid_of_pairs_is_refused(place: Path, old: str, new: str, said: str) -> None:
    grid = place / "wrong.toml"
    grid.write_text(GRID.replace(old, new, 1))
    with pytest.raises(UnbackdoorError) as refusal:
        all_cells(read(grid))
    assert said in str(refusal.value)
