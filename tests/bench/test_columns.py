"""Trainers and guards as columns of a grid: what they are, what they measure, and what the report makes of them."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import unbackdoor as ub
from pictures import write_pictures
from unbackdoor import Dataset, UnbackdoorError, attacks, evaluate, evaluate_guard, fit_guard, guards, load, trainers
from unbackdoor._bench import Store, identity
from unbackdoor._bench.grid import Grid, read
from unbackdoor._bench.plan import all_cells, plan
from unbackdoor._bench.run import bench
from unbackdoor._errors import IncompleteError
from unbackdoor._reports.store.run import report, write_report
from unbackdoor._victims.plant import plant, poisoned_again
from unbackdoor._victims.recipe import VictimRecipe

TASK = '[tasks.digits]\ntrain = "train.csv"\ntest = "test.csv"\nheld_out = 100\n'
BUDGET = "[[budgets]]\nn = 100\n"
BADNETS = '[[attacks]]\nname = "badnets"\nrate = [0.01, 0.05]\n'
ABL = '[[trainers]]\nname = "abl"\n'
STRIP = '[[guards]]\nname = "strip"\n'
SHARES = "false_alarms = [0.1, 0.05, 0.1]\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text(name)
    return tmp_path


def grid(folder: Path, text: str) -> Grid:
    (folder / "grid.toml").write_text(text)
    return read(folder / "grid.toml")


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(UnbackdoorError) as caught:
        all_cells(grid(folder, text))
    assert caught.value.exit_code == 2
    return str(caught.value)


class TestPlan:
    def test_a_cell_of_before_keeps_its_key(self, folder: Path) -> None:
        """The keys are those that an earlier version gave, without trainers and guards."""
        text = TASK + 'proxy = "train.csv"\n' + BUDGET + BADNETS.replace("[0.01, 0.05]", "0.01")
        text += '[[methods]]\nname = "ft-init+fst"\nfst.alpha = 0.2\n'
        before = [
            *("cee5bded8e64a3f4", "3124e4aecfec5b97", "622b6b8300802314"),  # of the control
            *("6a4bb4e3f63d8937", "e650df351ead7239", "7856e8e12d28455b"),
        ]
        assert [cell.key for cell in all_cells(grid(folder, text))] == before
        assert set(before) < {cell.key for cell in all_cells(grid(folder, SHARES + text + ABL + STRIP))}

    def test_victims_may_start_from_an_image_classifier(self, folder: Path) -> None:
        (folder / "base").mkdir()
        (folder / "base" / "config.json").write_text('{"architectures": ["ViTForImageClassification"]}')
        cells = all_cells(grid(folder, TASK + 'base = "base"\n' + BUDGET + BADNETS + ABL))
        assert {cell.label for cell in cells} == {"none", "fine-tuning", "abl"}

    def test_a_base_of_the_hub_is_for_the_data_of_the_task(self, digits: Dataset, folder: Path) -> None:
        text = TASK.replace("csv", "parquet") + 'base = "somebody/something"\n' + BUDGET + BADNETS
        write_pictures(digits.select(range(120)), folder / "test.parquet")
        write_pictures(digits.select(range(120)), folder / "train.parquet")
        assert len(all_cells(grid(folder, text))) == 6
        captions = ["a digit"] * 120
        write_pictures(digits.select(range(120)), folder / "train.parquet", caption=captions)
        assert len(all_cells(grid(folder, text))) == 6
        assert "has image-text, but ABL is for images" in refusal(folder, text + ABL)
        (folder / "train.csv").write_text("text,label\na film,0\n")
        assert "has text, but BadNets is for images" in refusal(folder, text.replace("train.parquet", "train.csv"))

    def test_a_trainer_without_clean_examples_has_a_cell_for_each_subject_and_seed(self, folder: Path) -> None:
        text = "seeds = [0, 1]\n" + TASK + BUDGET + "[[budgets]]\nn = 50\n" + BADNETS + ABL
        cells = [cell for cell in all_cells(grid(folder, text)) if cell.label == "abl"]
        assert len(cells) == 3 * 2
        assert all(cell.spec["clean"] is None and cell.method is None for cell in cells)
        described = {"name": "abl", "version": 1, "parameters": {}, "kind": "trainer"}
        assert all(cell.spec["method"] == described for cell in cells)
        assert [str(other) for cell in cells if cell.subject.control for other in cell.others] == [
            *("digits, badnets 1 %, victim seed 0", "digits, badnets 5 %, victim seed 0"),
            *("digits, badnets 1 %, victim seed 0", "digits, badnets 5 %, victim seed 0"),
        ]

    def test_a_guard_has_a_cell_for_each_subject_budget_and_seed(self, folder: Path) -> None:
        text = SHARES + "seeds = [0, 1]\n" + TASK + BUDGET + "[[budgets]]\nn = 50\n" + BADNETS + STRIP
        cells = [cell for cell in all_cells(grid(folder, text)) if cell.label == "strip"]
        assert len(cells) == 3 * 2 * 2
        described = {"name": "strip", "version": 1, "parameters": {}, "kind": "guard", "false_alarms": [0.05, 0.1]}
        assert all(cell.spec["method"] == described and cell.spec["clean"] is not None for cell in cells)
        assert all(not cell.others for cell in cells)

    def test_a_label_tells_two_of_one_kind_apart_and_cells_take_them(self, folder: Path) -> None:
        more = ABL + '[[trainers]]\nname = "abl"\nlabel = "abl, more"\nisolated = 0.02\n' + STRIP
        left = '[[cells]]\nleave_out = true\nmethod = ["abl, more", "strip", "fine-tuning"]\n'
        cells = all_cells(grid(folder, SHARES + TASK + BUDGET + BADNETS + more + left))
        assert {cell.label for cell in cells} == {"none", "abl"}
        alone = 'without = ["fine-tuning", "clean"]\n' + TASK + BUDGET + BADNETS + ABL
        assert {cell.label for cell in all_cells(grid(folder, alone))} == {"none", "abl"}

    def test_cells_go_to_other_processes(self, folder: Path) -> None:
        for cell in all_cells(grid(folder, SHARES + TASK + BUDGET + BADNETS + ABL + STRIP)):
            again = pickle.loads(pickle.dumps(cell))
            assert (again.key, again.label, str(again)) == (cell.key, cell.label, str(cell))
            assert again.column.value == cell.column.value

    def test_a_trainer_needs_the_control_that_poisoned_pictures_are_crafted_with(self, folder: Path) -> None:
        text = TASK + BUDGET + '[[attacks]]\nname = "label-consistent"\nrate = 0.01\n' + ABL
        made = grid(folder, text)
        trained = next(cell for cell in all_cells(made) if cell.label == "abl" and not cell.subject.control)
        control = next(cell.subject for cell in all_cells(made) if cell.subject.control)
        assert trained.surrogate == control
        todo = plan(made, Store(folder / "runs"), "missing", only=(trained.key,))
        assert todo.victims == (control, trained.subject)
        # A trigger that was fitted with it is in the store, so that the model is not needed once more.
        fitted = all_cells(grid(folder, text.replace("label-consistent", "low-frequency")))
        assert all(cell.surrogate is None for cell in fitted)


MODEL = '[tasks.a]\ntest = "test.csv"\nheld_out = 100\nmodel = "."\ncontrol = true\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            TASK + BUDGET + ABL.replace("abl", "alb"),
            "There is no trainer 'alb'. Did you mean 'abl'? See",
        ),
        (TASK + BUDGET + STRIP.replace("strip", "stripe"), "There is no guard 'stripe'. Did you mean 'strip'? See"),
        (TASK + BUDGET + ABL + "isolated = 2\n", "line 9: ABL.isolated must be"),
        (TASK + BUDGET + STRIP + "copies = 0\n", "line 9: Strip.copies must be at least 1, got 0."),
        (TASK + BUDGET + ABL + ABL, "line 9: trainers has 'abl' twice. Give one of them a label of its own."),
        (TASK + BUDGET + STRIP + STRIP, "line 9: guards has 'strip' twice. Give one of them a label of its own."),
        ("false_alarms = 0\n" + TASK + BUDGET + STRIP, "line 1: false_alarms.0 must be more than 0, got 0."),
        ("false_alarms = [0.1, 1]\n" + TASK + BUDGET + STRIP, "line 1: false_alarms.1 must be less than 1, got 1."),
        ("false_alarms = []\n" + TASK + BUDGET + STRIP, "line 1: false_alarms must have at least one entry."),
        (SHARES + TASK + BUDGET + ABL, "line 1: false_alarms are shares for guards, and the grid has none. Leave them"),
        (
            TASK + BUDGET + ABL + 'label = "fst"\n[[methods]]\nname = "fst"\n',
            "'fst' is the label of one of the methods. Give the trainer another label.",
        ),
        (
            TASK + BUDGET + STRIP + 'label = "abl"\n' + ABL,
            "'abl' is the label of one of the trainers. Give the guard another label.",
        ),
        (
            TASK + BUDGET + STRIP + 'label = "none"\n',
            "'none' is the label of the victims as they came. Give the guard another label.",
        ),
        (
            SHARES + TASK + BUDGET + '[[guards]]\nname = "rap"\n',
            "The grid has rap on tasks.digits, which has images, but Rap is for text. Take it away by cells.leave_out.",
        ),
        (
            TASK + BUDGET + '[[trainers]]\nname = "dpoe"\n',
            "The grid has dpoe on tasks.digits, which has images, but DPoE is for text. Take it away by",
        ),
        (
            MODEL + BUDGET + ABL,
            "The grid has the trainer abl on tasks.a, whose model is somebody else's: a trainer needs the data that a "
            "victim was trained on. Take it away by cells.leave_out.",
        ),
        (
            TASK + BUDGET + ABL + '[[attacks]]\nname = "input-aware"\n',
            "The grid has the trainer abl on tasks.digits with the attack input-aware, which trains the victim in a "
            "way of its own: its data alone carry no backdoor, so a trainer has nothing to withstand. Take it away by",
        ),
        (
            TASK + BUDGET + STRIP,  # one and five per cent
            "The grid has the guard strip with a budget of 100 clean examples, but a share of 0.01 in false_alarms "
            "needs 197: half of them set the threshold. Raise budgets.n or the share.",
        ),
        (
            SHARES + MODEL + BUDGET + '[[guards]]\nname = "onion"\n',
            "The grid has the guard onion on tasks.a, which has no reference: a causal language model (reference). "
            "Name one by reference = PATH.",
        ),
        (TASK + 'reference = "./gone"\n' + BUDGET + STRIP, "tasks.digits.reference: "),
    ],
)
def test_what_is_refused(text: str, said: str, folder: Path) -> None:
    assert said in refusal(folder, text)


TINY = """
seeds = [3]
false_alarms = [0.1, 0.3]
[tasks.digits]
train = "train.parquet"
test = "test.parquet"
second_test = "train.parquet"
held_out = 40
width = 2
epochs = 3
batch_size = 16
precision = "fp32"
[resources]
device = "cpu"
[[attacks]]
name = "badnets"
rate = 0.2
[[trainers]]
name = "abl"
isolated = 0.05
[[trainers]]
name = "bench_own_columns:Watched"
label = "watched"
[[guards]]
name = "strip"
copies = 4
[[guards]]
name = "badacts"
purify = true
[[budgets]]
n = 30
"""

# A trainer and a guard of one's own; the trainer keeps what it got.
OWN = """
import os
import torch
from unbackdoor import guards
from unbackdoor._value import value

@value
class Watched:
    "Trains as usual, and distrusts the first row."
    needs_clean = True
    def __call__(self, data, model, run):
        torch.save((len(run.clean), data.pixels, data.labels), os.environ["SEEN"])
        run.distrust(torch.tensor([0]), torch.tensor([1.0]), "its place")
        return run.train(model, data)

@value
class Broken:
    "Cannot be fitted."
    measure = "nothing"
    suspicious = "low"
    def __call__(self, model, clean, run):
        raise ValueError("this one fails")
    def scores(self, model, inputs, learnt, run):
        raise AssertionError
"""
SETTINGS: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def place(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("columns")
    write_pictures(digits.select(range(200)), folder / "train.parquet")
    write_pictures(digits.select(range(200, 300)), folder / "test.parquet")
    (folder / "bench_own_columns.py").write_text(OWN)
    (folder / "tiny.toml").write_text(TINY)
    return folder


@pytest.fixture(scope="module")
def store(place: Path) -> Store:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        patch.setenv("SEEN", str(place / "seen.pt"))
        bench(str(place / "tiny.toml"), out=str(place / "runs"))
    return Store(place / "runs")


def found(store: Store, attack: str, method: str) -> tuple[dict[str, Any], dict[str, Any]]:
    ((spec, result),) = [
        (spec, result)
        for spec, result in store.cells()
        if (spec["victim"]["attack"]["name"], spec["method"]["name"].rpartition(":")[2]) == (attack, method)
    ]
    assert result["status"] == "done", result
    return spec, result


def drawn(place: Path, encode: Any) -> tuple[Dataset, Dataset]:
    """The test examples that are scored, and the clean budget, from the rows that the store keeps."""
    rows = {
        entry["spec"]["draw"]: torch.tensor(entry["rows"])
        for path in (place / "runs" / "rows").iterdir()
        for entry in [json.loads(path.read_text())]
    }
    whole = Dataset.load(place / "test.parquet", encode)
    others = torch.ones(len(whole), dtype=torch.bool)
    others[rows["held out"]] = False
    return whole.select(others.nonzero().flatten()), whole.select(rows["held out"]).select(rows["budget"])


def test_a_trainer_is_scored_as_train_and_evaluate_do(store: Store, place: Path) -> None:
    """Poisoned, trained and scored once more by the functions of the library."""
    spec, result = found(store, "badnets", "abl")
    data = Dataset.load(place / "train.parquet")
    poisoned = ub.poison(data, attacks.BadNets(), rate=0.2, seed=0, classes=10)
    recipe = VictimRecipe(width=2, epochs=3, batch_size=16)
    trained = ub.train(
        poisoned.data, trainers.ABL(isolated=0.05), recipe, seed=3, poisoned_rows=poisoned.rows, **SETTINGS
    )
    victim = store.victim(identity(spec["victim"]))
    test, _ = drawn(place, trained.encode)
    assert result["score"] == evaluate(trained.model, test, attack=victim / "attack.json", **SETTINGS).to_json()
    more = Dataset.load(place / "train.parquet", trained.encode)
    again = evaluate(trained.model, more, attack=victim / "attack.json", **SETTINGS).to_json()
    assert result["second_test"] == again
    suspects = trained.record["suspects"]
    assert {key: result["distrusted"][key] for key in ("measure", "precision", "recall")} == {
        key: suspects[key] for key in ("measure", "precision", "recall")
    }
    assert (result["distrusted"]["share"]["value"], result["distrusted"]["share"]["n"]) == (suspects["n"] / 200, 200)
    assert result["method"]["parameters"]["isolated"] == 0.05
    assert (result["usable"] in (True, False), result["implanted"]) == (
        True,
        found(store, "badnets", "none")[1]["implanted"],
    )


def test_a_trainer_that_needs_clean_examples_gets_the_budget_and_what_the_victim_was_trained_on(
    store: Store, place: Path
) -> None:
    count, pixels, labels = torch.load(place / "seen.pt", weights_only=True)  # of the attack, which comes last
    poisoned = ub.poison(Dataset.load(place / "train.parquet"), attacks.BadNets(), rate=0.2, seed=0, classes=10)
    assert count == 30
    assert torch.equal(pixels, poisoned.data.pixels)
    assert torch.equal(labels, poisoned.data.labels)
    _, result = found(store, "badnets", "Watched")
    assert result["distrusted"]["precision"]["value"] == float(0 in poisoned.rows.tolist())
    assert result["distrusted"]["recall"]["n"] == len(poisoned.rows)


def test_the_clean_control_of_a_trainer_is_shown_the_triggers_of_the_victims(store: Store) -> None:
    victim, _ = found(store, "badnets", "none")
    _, control = found(store, "none", "abl")
    assert control["flips"].keys() == {identity(victim["victim"])}
    assert control["distrusted"]["precision"]["value"] == 0  # no row is poisoned
    assert control["distrusted"]["recall"] is None
    assert control["implanted"] is None


@pytest.mark.parametrize(
    ("name", "guard"), [("strip", guards.Strip(copies=4)), ("badacts", guards.BadActs(purify=True))]
)
@pytest.mark.parametrize("attack", ["badnets", pytest.param("none", marks=pytest.mark.thorough)])
def test_a_guard_has_at_each_share_the_numbers_of_a_guard_that_was_fitted_for_it(
    store: Store, place: Path, name: str, guard: Any, attack: str
) -> None:
    """Inputs are scored once, and the threshold is moved; here each share has a guard and a score of its own."""
    spec, result = found(store, attack, name)
    victim = store.victim(identity(spec["victim"]))
    model, encode = load(victim)
    test, clean = drawn(place, encode)
    assert [each["false_alarms"] for each in result["guard"]["at"]] == [0.1, 0.3]
    for each in result["guard"]["at"]:
        fitted = fit_guard(model, clean, guard, false_alarms=each["false_alarms"], seed=3, **SETTINGS)
        trigger = None if attack == "none" else victim / "attack.json"
        score = evaluate_guard(fitted, model, test, attack=trigger, **SETTINGS)
        assert each == {"false_alarms": each["false_alarms"], "threshold": fitted.threshold, "score": score.to_json()}
    assert (result["guard"]["fitted_on"], result["guard"]["threshold_on"]) == (15, 15)
    plain = evaluate(model, test, attack=trigger, **SETTINGS).to_json()
    assert result["score"] == plain  # of the victim without the guard


def test_a_grid_with_columns_resumes(store: Store, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        bench(str(place / "tiny.toml"), out=store.address)
        assert capsys.readouterr().out == "Nothing to do: 12 cells, none of them left.\n"
        spec, before = found(store, "badnets", "strip")
        bench(str(place / "tiny.toml"), out=store.address, rerun="all", only=(identity(spec),))
    again = found(store, "badnets", "strip")[1]
    assert again["guard"]["at"] == before["guard"]["at"]


def test_a_report_has_trainers_in_the_tables_of_methods_and_guards_in_their_own(store: Store, tmp_path: Path) -> None:
    made = report(store.address)
    assert {row.method for row in made.rows} == {"none", "fine-tuning", "abl (isolated=0.05)", "watched"}
    _, trained = found(store, "none", "abl")
    row = next(row for row in made.rows if row.control and row.method.startswith("abl"))
    assert row.distrusted is not None
    assert row.distrusted.mean == trained["distrusted"]["share"]["value"]
    assert row.clean_accuracy is not None
    assert row.clean_accuracy.mean == trained["score"]["clean_accuracy"]["value"]
    _, guarded = found(store, "none", "strip")
    (first, second) = [row for row in made.guards if row.control and row.guard.startswith("strip")]
    assert [first.asked, second.asked] == [0.1, 0.3]
    alarms = guarded["guard"]["at"][0]["score"]["false_alarms"]
    assert first.false_alarms is not None
    assert (first.false_alarms.mean, first.false_alarms.interval) == (alarms["value"], (alarms["low"], alarms["high"]))
    assert first.missed is None
    assert first.clean_n == alarms["n"] == 60
    for suffix in ("md", "html", "tex", "json", "csv"):
        write_report(store.address, str(tmp_path / f"made.{suffix}"))
    page = (tmp_path / "made.md").read_text()
    assert "## Distrusted rows" in page
    lines = [line for line in page.splitlines() if line.startswith("| digits") and "strip" in line]
    assert len(lines) == 2 * 2
    assert f"{100 * alarms['value']:.1f} ({100 * alarms['low']:.1f} to {100 * alarms['high']:.1f})" in lines[0]
    assert "<h2>Guards</h2>" in (tmp_path / "made.html").read_text()


def test_a_guard_that_fails_is_in_the_report(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(place)
    text = TINY[: TINY.index("[[attacks]]")].replace('second_test = "train.parquet"\n', "")
    text += '[[guards]]\nname = "bench_own_columns:Broken"\nlabel = "broken"\n[[budgets]]\nn = 30\n'
    (place / "broken.toml").write_text('without = ["fine-tuning"]' + text)
    with pytest.raises(IncompleteError, match="the first said: ValueError: this one fails"):
        bench(str(place / "broken.toml"), out=str(tmp_path / "runs"))
    made = report(tmp_path / "runs")
    assert {(row.guard, row.failed, row.messages) for row in made.guards} == {
        ("broken", 1, ("ValueError: this one fails",))
    }
    write_report(str(tmp_path / "runs"), str(tmp_path / "made.md"))
    assert "- broken: ValueError: this one fails" in (tmp_path / "made.md").read_text()
    write_report(str(tmp_path / "runs"), str(tmp_path / "made.html"))
    assert "this one fails" in (tmp_path / "made.html").read_text()


@pytest.mark.parametrize("attack", [attacks.LabelConsistent(steps=2), attacks.LowFrequency(steps=2), attacks.BadNets()])
def test_data_are_poisoned_again_as_they_were(attack: Any, digits: Dataset) -> None:
    data = digits.select(range(200))
    rate = 0.05
    recipe = VictimRecipe(width=2, epochs=1, rate=rate)
    victim = plant(data, attack, recipe, 1, test=digits.select(range(200, 260)), **SETTINGS)
    assert victim.poisoned is not None
    assert victim.trigger is not None
    again = poisoned_again(data, victim.trigger, recipe, 1, **SETTINGS)
    assert torch.equal(again.rows, victim.poisoned.rows)
    assert torch.equal(again.data.pixels, victim.poisoned.data.pixels)
    assert torch.equal(again.data.labels, victim.poisoned.data.labels)
    # A trigger that was fitted is taken as it is: another one gives other pictures.
    arrays = {name: torch.zeros_like(array) for name, array in victim.trigger.arrays.items()}
    if arrays:
        other = poisoned_again(data, dataclasses.replace(victim.trigger, arrays=arrays), recipe, 1, **SETTINGS)
        assert not torch.equal(other.data.pixels, again.data.pixels)


POISONED = """
seeds = [3]
victim_seeds = [1, 2]
[tasks.given]
train = "given.parquet"
test = "test.parquet"
triggered = "triggered.parquet"
target = 0
control = "clean"
held_out = 40
width = 2
epochs = 3
batch_size = 16
precision = "fp32"
[resources]
device = "cpu"
[[trainers]]
name = "plain"
[[trainers]]
name = "abl"
isolated = 0.05
[[budgets]]
n = 30
"""


@pytest.mark.thorough
def test_trainers_withstand_data_that_others_poisoned(
    place: Path, store: Store, digits: Dataset, tmp_path: Path
) -> None:
    """The victim is what plain training makes of the data as they are; whether a row is poisoned, a column says."""
    spec, _ = found(store, "none", "none")
    (tmp_path / "clean").symlink_to(store.victim(identity(spec["victim"])))
    (tmp_path / "test.parquet").symlink_to(place / "test.parquet")
    poisoned = ub.poison(Dataset.load(place / "train.parquet"), attacks.BadNets(), rate=0.2, seed=0, classes=10)
    truth = torch.isin(torch.arange(200), poisoned.rows).tolist()
    write_pictures(poisoned.data, tmp_path / "given.parquet", poisoned=truth)
    stamped = ub.poison(digits.select(range(200, 300)), attacks.BadNets(), rate=1.0, seed=0, classes=10)
    marked = dataclasses.replace(stamped.data, labels=digits.labels[200:300])
    write_pictures(marked, tmp_path / "triggered.parquet")
    bench(str(_written(tmp_path, POISONED)), out=str(tmp_path / "runs"))
    cells = {
        (spec["victim"]["attack"]["name"], spec["method"]["name"], spec["victim"]["seed"]): (spec, result)
        for spec, result in Store(tmp_path / "runs").cells()
    }
    assert all(result["status"] == "done" for _, result in cells.values())
    methods = ("none", "fine-tuning", "plain", "abl")
    assert cells.keys() == {("own", method, seed) for method in methods for seed in (1, 2)} | {
        ("none", method, None) for method in ("none", "fine-tuning")
    }
    spec, victim = cells["own", "none", 1]
    assert (spec["victim"]["rate"], victim["training_seconds"] >= 0) == (None, True)
    assert cells["none", "none", None][1]["flips"].keys() == {
        identity(cells["own", "none", seed][0]["victim"]) for seed in (1, 2)
    }
    recipe = VictimRecipe(width=2, epochs=3, batch_size=16)
    trained = ub.train(Dataset.load(tmp_path / "given.parquet"), trainers.Plain(), recipe, seed=1, **SETTINGS)
    kept = load(Store(tmp_path / "runs").victim(identity(spec["victim"]))).model.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in trained.model.state_dict().items())
    assert "attack_success" in victim["score"]
    _, abl = cells["own", "abl", 1]
    assert abl["distrusted"]["recall"]["n"] == len(poisoned.rows)
    write_report(str(tmp_path / "runs"), str(tmp_path / "made.md"))


def test_classes_that_do_not_fit_are_refused_before_the_victim_is_trained(
    place: Path, digits: Dataset, tmp_path: Path
) -> None:
    named = dataclasses.replace(digits.select(range(200, 300)), classes=tuple(f"digit {n}" for n in range(10)))
    (tmp_path / "given.parquet").symlink_to(place / "train.parquet")
    for test, triggered in ((digits.select(range(200, 300)), named), (named, named)):
        write_pictures(test, tmp_path / "test.parquet")
        write_pictures(triggered, tmp_path / "triggered.parquet")
        text = 'without = ["clean"]\n' + POISONED.replace('control = "clean"\n', "")
        with pytest.raises(IncompleteError, match=r"8 of 8 cells failed; the first said: .*the class 'digit"):
            bench(str(_written(tmp_path, text)), out=str(tmp_path / "runs"), rerun="all")
        assert not Store(tmp_path / "runs").victims()


def _written(folder: Path, text: str) -> Path:
    (folder / "given.toml").write_text(text)
    return folder / "given.toml"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "target = 0\n",
            "",
            "tasks.digits.triggered and tasks.digits.target go together: if train is poisoned already",
        ),
        (
            "target = 0\n",
            "target = 0\ncontrol = true\n",
            "control must be a clean model, since the task trains its own",
        ),
        ("n = 100", 'n = 100\nfrom = "train"', "drawn from train, but the train of tasks.digits is poisoned already"),
        ('triggered = "test.csv"\n', "", "tasks.digits.target goes with an existing model"),
    ],
)
def test_what_data_that_others_poisoned_need(old: str, new: str, said: str, folder: Path) -> None:
    text = TASK + 'triggered = "test.csv"\ntarget = 0\n' + BUDGET + ABL
    assert len(all_cells(grid(folder, text))) == 3
    assert said in refusal(folder, text.replace(old, new, 1))
