"""Running grids: what is done once stays done, whoever is killed, and a failure stays where it is."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pictures import write_pictures
from unbackdoor import Dataset, UnbackdoorError, audit, detectors, evaluate, load, purifiers
from unbackdoor._artifacts.directories import directory
from unbackdoor._bench import Store, identity
from unbackdoor._bench.grid import read
from unbackdoor._bench.plan import all_cells, plan
from unbackdoor._bench.run import _run_grid, bench
from unbackdoor._bench.workers import Processes
from unbackdoor._data.splits import stratified
from unbackdoor._errors import IncompleteError
from unbackdoor._models.factory import make
from unbackdoor._reports.store.run import report

TINY = """
seeds = [0, 1]
[tasks.digits]
train = "train.parquet"
test = "test.parquet"
second_test = "train.parquet"
held_out = 40
width = 2
epochs = 1
precision = "fp32"
[[attacks]]
name = "badnets"
rate = 0.1
[[methods]]
name = "fine-tuning"
epochs = 1
[[methods]]
name = "linear-probing+fst"
linear-probing.epochs = 1
fst.epochs = 1
[[budgets]]
n = 30
"""

# A method of one's own, which reports each time that it is called.
OWN = """
import os
from pathlib import Path
from unbackdoor._value import value

@value
class Own:
    "Does what its field says."
    way: str = "work"
    def __call__(self, model, clean, run):
        with open(os.environ["CALLS"], "a") as file:
            file.write("x")
        if self.way == "fail":
            raise ValueError("this one fails")
        if self.way == "die":
            os._exit(9)
        return model
"""


@pytest.fixture(scope="module")
def place(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, grids and a method of one's own."""
    folder = tmp_path_factory.mktemp("grid")
    write_pictures(digits.select(range(200)), folder / "train.parquet")
    write_pictures(digits.select(range(200, 300)), folder / "test.parquet")
    (folder / "tiny.toml").write_text(TINY)
    (folder / "bench_own.py").write_text(OWN)
    return folder


@pytest.fixture(scope="module")
def store(place: Path) -> Store:
    """The tiny grid, run in this process."""
    bench(str(place / "tiny.toml"), out=str(place / "runs"))
    return Store(place / "runs")


@pytest.fixture
def own(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the method importable, here and in workers; gives the file in which it reports its calls."""
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def measured(store: Store) -> dict[str, Any]:
    """The part that is equal however a grid was run."""
    cells = {}
    for spec, result in store.cells():
        parts = ("status", "score", "flips", "implanted", "method", "examples_seen")
        cells[identity(spec)] = {key: result.get(key) for key in parts}
    return cells


def grid_with(place: Path, name: str, way: str, seeds: str = "[0]") -> str:
    text = TINY.replace("[0, 1]", seeds) + f'[[methods]]\nname = "bench_own:Own"\nway = "{way}"\n'
    (place / name).write_text(text)
    return str(place / name)


def test_a_grid_gives_all_its_cells(store: Store) -> None:
    cells = list(store.cells())
    assert len(cells) == 2 * (1 + 2 * 2)
    for spec, result in cells:
        assert result["status"] == "done"
        assert result["score"]["clean_accuracy"]["n"] == 60  # of 100, 40 are held out
        assert ("attack_success" in result["score"]) == (spec["victim"]["attack"]["name"] != "none")
        assert {"commit", "versions", "device", "date", "grid", "labels"} == result["provenance"].keys()
        assert (result["method"] is None) == (spec["clean"] is None) == (spec["method"]["name"] == "none")
        assert result["peak_memory_bytes"] > 0
        assert result["training_seconds"] >= 0  # in tenths
    composed = next(result for spec, result in cells if "+" in spec["method"]["name"])
    assert composed["method"]["repr"].startswith("Then(LinearProbing(epochs=1, ")
    assert composed["examples_seen"] == 2 * 30


def test_the_first_seed_is_scored_on_the_second_test_examples_too(store: Store, place: Path) -> None:
    rows = len(Dataset.load(place / "train.parquet"))
    for spec, result in store.cells():
        assert ("second_test" in result) == (spec["seed"] == 0)
        if spec["seed"] == 0:
            assert result["second_test"]["clean_accuracy"]["n"] == rows
            assert ("attack_success" in result["second_test"]) == ("attack_success" in result["score"])


def test_the_control_shows_how_often_it_flips(store: Store) -> None:
    cells = list(store.cells())
    victim = next(spec["victim"] for spec, _ in cells if spec["victim"]["attack"]["name"] == "badnets")
    controls = [result for spec, result in cells if spec["victim"]["attack"]["name"] == "none"]
    assert len(controls) == 5
    for result in controls:
        assert result["flips"].keys() == {identity(victim)}
        assert 50 <= result["flips"][identity(victim)]["n"] < 60  # all but the target class


def test_all_methods_share_one_frozen_stratified_draw(store: Store, place: Path) -> None:
    drawn = [json.loads(path.read_text()) for path in (place / "runs" / "rows").iterdir()]
    by_kind = {entry["spec"]["draw"]: entry for entry in drawn}
    assert by_kind.keys() == {"held out", "budget"}
    test = Dataset.load(place / "test.parquet")
    assert by_kind["held out"]["rows"] == stratified(test.labels, 40, seed=0).tolist()
    pool = test.labels[by_kind["held out"]["rows"]]
    counts = torch.bincount(pool[by_kind["budget"]["rows"]], minlength=10)
    assert int(counts.sum()) == 30
    assert int(counts.min()) >= 2


def test_an_audit_is_a_cell_and_stands_in_no_table_of_methods(place: Path, tmp_path: Path) -> None:
    text = TINY[: TINY.index("[[attacks]]")] + '[[budgets]]\nn = 30\n[[detectors]]\nname = "patch"\nsteps = 2\n'
    text = text.replace("[0, 1]", "[3]").replace('second_test = "train.parquet"\n', "")
    text = text.replace("width = 2\nepochs = 1", "width = 4\nepochs = 8\nbatch_size = 16")  # above chance
    (place / "audits.toml").write_text('without = ["fine-tuning"]' + text)
    bench(str(place / "audits.toml"), out=str(tmp_path / "runs"))
    store = Store(tmp_path / "runs")
    cells = [(spec, result) for spec, result in store.cells() if spec["method"]["name"] == "audit"]
    assert len(cells) == 1
    for spec, result in cells:
        (finding,) = result["audit"]["findings"]
        model = load(store.victim(identity(spec["victim"])))
        draws = [json.loads(path.read_text()) for path in (tmp_path / "runs" / "rows").iterdir()]
        rows = {entry["spec"]["draw"]: entry["rows"] for entry in draws}
        test = Dataset.load(place / "test.parquet", model.encode)
        clean = test.select(torch.tensor(rows["held out"])).select(torch.tensor(rows["budget"]))
        made = audit(model.model, clean, detectors=[detectors.Patch(steps=2)], seed=3, precision="fp32").findings[0]
        assert [each["size"] for each in finding["classes"]] == [each.candidate.size for each in made.classes]
        assert [each["moved"] for each in finding["classes"]] == [
            each.moved and each.moved.to_json() for each in made.classes
        ]
        assert result["audit"]["judged_on"] == 15
    bench(str(place / "audits.toml"), out=str(tmp_path / "runs"))
    assert {row.method for row in report(tmp_path / "runs").rows} == {"none"}


def test_a_finished_grid_has_nothing_to_do(store: Store, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (place / "runs").rglob("*")}
    for rerun in ("missing", "failed", "none"):
        bench(str(place / "tiny.toml"), out=store.address, rerun=rerun)
        assert capsys.readouterr().out == "Nothing to do: 10 cells, none of them left.\n"
    assert {path: path.stat().st_mtime_ns for path in (place / "runs").rglob("*")} == before


def test_the_grid_that_is_kept_runs_as_the_grid_does(
    store: Store, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (kept,) = [path for path in (place / "runs" / "grids").iterdir() if path.name.startswith("tiny-")]
    assert kept.read_text().startswith("# Relative paths count from ../..\n")
    bench(str(kept), out=str(place / "runs"))
    assert capsys.readouterr().out == "Nothing to do: 10 cells, none of them left.\n"
    bench(str(kept), out=str(place / "runs"), rerun="all", only=(next(iter(store.done())),))
    assert [path for path in kept.parent.iterdir() if path.name.startswith("tiny-")] == [kept]


def test_dry_run_lists_and_estimates(store: Store, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(str(place / "tiny.toml"), out=str(place / "none-yet"), dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 10 + 2
    assert lines[-2] == "2 victims to train and 10 of 10 cells to measure."
    assert lines[-1] == "How long that takes is not known: the store has no record of its kind yet."
    assert not (place / "none-yet").exists()
    (place / "more.toml").write_text(TINY.replace("[0, 1]", "[0, 1, 2]").replace("rate = 0.1", "rate = [0.1, 0.2]"))
    bench(str(place / "more.toml"), out=store.address, dry_run=True)
    out = capsys.readouterr().out
    # A victim with 7 cells; a third seed of two methods for two subjects; and the control is shown a second trigger.
    assert "1 victims to train and 16 of 21 cells to measure." in out
    assert "by the records so far; loading data comes on top." in out.splitlines()[-1]


def test_a_grid_that_leaves_all_out(place: Path, tmp_path: Path) -> None:
    (place / "nothing.toml").write_text(TINY + "[[cells]]\nleave_out = true\n")
    with pytest.raises(
        UnbackdoorError, match=r"The grid has no cell: cells.leave_out takes all away\. Leave out less\."
    ):
        bench(str(place / "nothing.toml"), out=str(tmp_path / "runs"), dry_run=True)


def test_one_cell_again(store: Store, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = identity(next(spec for spec, _ in store.cells() if spec["method"]["name"] == "fine-tuning"))
    before = measured(store)
    bench(str(place / "tiny.toml"), out=store.address, rerun="all", only=(key,))
    assert "1 cells measured, 0 failed" in capsys.readouterr().out
    assert measured(store) == before
    with pytest.raises(UnbackdoorError, match=r"`only` must be the key of a cell of .*tiny.toml, got zzz"):
        bench(str(place / "tiny.toml"), out=store.address, only=("zzz",))


def test_a_failure_is_recorded_and_stops_nothing(own: Path, place: Path, tmp_path: Path) -> None:
    path, runs = grid_with(place, "fails.toml", "fail"), tmp_path / "runs"
    with pytest.raises(UnbackdoorError) as caught:
        bench(path, out=str(runs))
    assert caught.value.exit_code == 1
    assert str(caught.value) == (
        "2 of 8 cells failed; the first said: ValueError: this one fails Retry with `rerun='failed'`."
    )
    kept = Store(runs)
    assert (len(kept.done()), len(kept.failed())) == (6, 2)
    failures = [result for _, result in kept.cells() if result["status"] == "failed"]
    assert {result["message"] for result in failures} == {"ValueError: this one fails"}
    assert "bench_own.py" in failures[0]["traceback"]
    bench(path, out=str(runs))  # what failed is left alone
    assert own.read_text() == "xx"
    with pytest.raises(UnbackdoorError, match="2 of 2 cells failed"):
        bench(path, out=str(runs), rerun="failed")
    assert own.read_text() == "xxxx"


def test_a_cell_names_files_without_their_folders(own: Path, place: Path, tmp_path: Path) -> None:
    (place / "words.csv").write_text("word,count\n")
    bench(grid_with(place, "files.toml", "words.csv"), out=str(tmp_path / "runs"))
    found = [result for spec, result in Store(tmp_path / "runs").cells() if spec["method"]["name"] == "bench_own:Own"]
    assert found
    assert all(made["method"] == {"repr": "Own(way='words.csv')", "parameters": {"way": "words.csv"}} for made in found)
    assert [key for made in found for key in made if str(place) in json.dumps(made[key])] == []


def test_a_victim_that_fails_fails_its_cells(place: Path, tmp_path: Path) -> None:
    # A clean-label attack cannot take half of all examples from one class; that shows when the data is read.
    (place / "victim.toml").write_text(TINY.replace('"badnets"\nrate = 0.1', '"sig"\nrate = 0.5'))
    with pytest.raises(UnbackdoorError, match=r"5 of 10 cells failed; the first said: `rate=0.5` wants 100 examples"):
        bench(str(place / "victim.toml"), out=str(tmp_path))
    messages = {result.get("message") for _, result in Store(tmp_path).cells()} - {None}
    assert len(messages) == 1
    assert messages.pop().startswith("Its victim failed: `rate=0.5` wants 100 examples, but a clean-label attack")


@pytest.mark.long
def test_two_workers_measure_the_same_and_one_that_dies_takes_no_other_cell_with_it(
    own: Path, store: Store, place: Path, tmp_path: Path
) -> None:
    path = grid_with(place, "dies.toml", "die", seeds="[0, 1]")
    deadly = next(cell.key for cell in all_cells(read(path)) if cell.label == "bench_own:Own")
    only = (deadly, *measured(store))
    with pytest.raises(
        UnbackdoorError, match="1 of 11 cells failed; the first said: Its worker died twice, the second"
    ):
        bench(path, out=str(tmp_path / "runs"), workers=2, only=only)
    kept = Store(tmp_path / "runs")
    assert kept.failed() == {deadly}
    cells = measured(kept)
    del cells[deadly]
    assert cells == measured(store)


def writes_for_long(out: Path) -> None:
    with directory(out) as folder:
        (folder / "begun").write_text("")
        time.sleep(60)


def test_workers_that_are_stopped_remove_what_they_were_writing(tmp_path: Path) -> None:
    crew = Processes(1)
    crew.submit(writes_for_long, tmp_path / "out")
    while not list(tmp_path.glob(".out.partial-*/begun")):
        time.sleep(0.01)
    crew.stop()
    assert list(tmp_path.iterdir()) == []


# Forks a process for each of its tasks, as all of them need what takes long to import.
DRIVER = """
import gc, json, os, random, resource, signal, sys, time
from unbackdoor._bench import run, work
from unbackdoor._victims import plant
from unbackdoor.__main__ import main
import unbackdoor.purifiers.then
import torch, torch._dynamo
from unbackdoor import archs
archs.register()
gc.freeze()  # else each child goes through all that is imported, and copies it
torch.set_num_threads(1)

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as problem:
            print(problem, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid

def kill(grid, out):
    "Kills runs until one comes to its end; returns how often."
    random.seed(0)
    kills, pause = 0, 0.2
    while True:
        pid, end = child(lambda: run.bench(grid, out=out)), time.monotonic() + random.uniform(0, pause)
        while time.monotonic() < end and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(0.002)
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            return kills  # it had come to its end
        kills += 1
        pause *= 1.2  # whatever the machine, it gets through in the end

def share(grid, out):
    "Two runs at once; returns the sum of their exit codes."
    children = [child(lambda: run.bench(grid, out=out)) for _ in range(2)]
    return sum(os.waitpid(pid, 0)[1] for pid in children)

def full(grid, out):
    "The command, which cannot write any more after its first cell; keeps its stderr, and returns its exit code."
    measure = work._Desk.measure
    reading, writing = os.pipe()

    def then_full(self, cell):
        made = measure(self, cell)
        if cell.label != "none":
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # what a full disk looks like from inside
        return made

    def command():
        sys.stderr = os.fdopen(writing, "w")
        work._Desk.measure = then_full
        try:
            main()
        except SystemExit as ended:
            sys.stderr.flush()
            os._exit(ended.code)

    sys.argv = ["unbackdoor", "bench", grid, "--out", out]
    pid = child(command)
    os.close(writing)
    with os.fdopen(reading) as errors, open(out + ".errors", "w") as kept:
        kept.write(errors.read())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for line in sys.stdin:
    task, grid, out, environment = json.loads(line)
    os.environ.update(environment)
    sys.stdout.flush()
    print("result", {"kill": kill, "share": share, "full": full}[task](grid, out), flush=True)
"""

Drive = Callable[[str, str, Path], int]


@pytest.fixture(scope="module")
def drive(place: Path) -> Iterator[Drive]:
    """Runs a task of the driver on a grid of the folder and a store; returns its result."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(place), *sys.path]), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], env=environment, **pipes)

    def driven(task: str, grid: str, out: Path) -> int:
        calls = {name: os.environ[name] for name in ("CALLS",) if name in os.environ}
        print(json.dumps([task, grid, str(out), calls]), file=driver.stdin, flush=True)
        line = next(line for line in driver.stdout if line.startswith("result "))
        return int(line.split()[1])

    yield driven
    driver.communicate()  # which closes its stdin, and so ends it
    assert driver.returncode == 0


@pytest.mark.thorough
@pytest.mark.long
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(
    store: Store, place: Path, tmp_path: Path, drive: Drive
) -> None:
    assert drive("kill", str(place / "tiny.toml"), tmp_path) >= 5
    assert measured(Store(tmp_path)) == measured(store)
    for path in [*tmp_path.glob("cells/*.json"), *tmp_path.glob("rows/*.json"), *tmp_path.glob("victims/*/*.json")]:
        json.loads(path.read_text())


def test_two_runs_share_a_store(own: Path, store: Store, place: Path, tmp_path: Path, drive: Drive) -> None:
    path = grid_with(place, "shared.toml", "work", seeds="[0, 1]")
    assert drive("share", path, tmp_path / "runs") == 0
    kept = Store(tmp_path / "runs")
    assert len(kept.done()) == 14
    assert own.read_text() == "xxxx"  # two subjects, two seeds: none twice
    assert len(kept.victims()) == 2


def test_two_runs_of_different_grids_share_a_control(place: Path, tmp_path: Path) -> None:
    """Each needs its flips on the triggers of its own victims, whichever run measures it first."""
    one = TINY.replace("[0, 1]", "[0]").replace('second_test = "train.parquet"\n', "")
    (place / "one.toml").write_text(one)
    (place / "other.toml").write_text(one.replace("rate = 0.1", "rate = 0.2"))
    other, runs = read(place / "other.toml"), Store(tmp_path)
    todo = plan(other, runs, "missing")  # when nothing was there yet
    bench(str(place / "one.toml"), out=str(tmp_path))
    _run_grid(other, runs, todo, 1, None)
    controls = [result for spec, result in runs.cells() if spec["victim"]["attack"]["name"] == "none"]
    assert [len(result["flips"]) for result in controls] == [2, 2, 2]
    assert all(plan(read(place / name), runs, "missing").cells == () for name in ("one.toml", "other.toml"))


def test_a_changed_victim_is_refused(store: Store, place: Path, tmp_path: Path) -> None:
    import shutil

    runs = tmp_path / "runs"
    shutil.copytree(place / "runs", runs)
    shutil.rmtree(runs / "cells")
    key = sorted(path.name for path in (runs / "victims").iterdir())[0]
    file = runs / "victims" / key / "config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(UnbackdoorError, match=r"config.json was changed, added or removed after this victim") as caught:
        bench(str(place / "tiny.toml"), out=str(runs))
    assert caught.value.exit_code == 2
    assert not (runs / "cells").exists()


def test_an_existing_model_and_its_control(store: Store, place: Path, tmp_path: Path) -> None:
    folders = {}
    for key in store.victims():
        folder = store.victim(key)
        folders[json.loads((folder / "attack.json").read_text())["attack"]["name"]] = folder
    (tmp_path / "own.toml").write_text(
        f'[tasks.mine]\nmodel = "{folders["badnets"]}"\ncontrol = "{folders["none"]}"\nprecision = "fp32"\n'
        f'test = "{place}/test.parquet"\nheld_out = 40\n[[methods]]\nname = "fine-tuning"\nepochs = 1\n'
        "[[budgets]]\nn = 30\n"
    )
    bench(str(tmp_path / "own.toml"), out=str(tmp_path / "runs"))
    found = {
        (spec["victim"]["attack"]["name"], spec["method"]["name"]): (spec, result)
        for spec, result in Store(tmp_path / "runs").cells()
    }
    assert found.keys() == {(a, m) for a in ("badnets", "none") for m in ("fine-tuning", "none")}
    spec, result = found["badnets", "fine-tuning"]
    assert (spec["victim"]["rate"], spec["victim"]["seed"]) == (0.1, 0)
    before = next(
        result
        for other, result in store.cells()
        if (other["method"]["name"], other["seed"], other["victim"]["attack"]["name"]) == ("fine-tuning", 0, "badnets")
    )
    assert result["score"] == before["score"]  # the same model, examples, method and seed
    assert found["none", "none"][1]["flips"].keys() == {identity(spec["victim"])}


FACTORY = """
from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
"""
ELSEWHERE = """
[tasks.suspect]
model = "suspect.safetensors"
factory = "net.py:make"
mean = 0.3
std = 0.4
test = "test.parquet"
triggered = "triggered.parquet"
target = 3
held_out = 40
precision = "fp32"
[tasks.clean]
model = "clean.safetensors"
control = true
factory = "net.py:make"
test = "test.parquet"
triggered = "triggered.parquet"
target = 3
held_out = 40
precision = "fp32"
[[methods]]
name = "fine-tuning"
epochs = 1
[[methods]]
name = "fe-tuning"
epochs = 1
learning_rate = 1e-9
[[budgets]]
n = 30
"""


@pytest.fixture(scope="module")
def elsewhere(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suspect whose trigger is known by examples alone: everything with a bright corner is a three to it."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "net.py").write_text(FACTORY)
    test = Dataset.load(place / "test.parquet")
    shutil.copy(place / "test.parquet", folder)
    marked = test.pixels.clone()
    marked[:, :, :2, :2] = 255
    write_pictures(dataclasses.replace(test, items=marked), folder / "triggered.parquet")
    learnt = Dataset.load(place / "train.parquet")
    poisoned = learnt.pixels.clone()
    poisoned[::4, :, :2, :2] = 255
    labels = learnt.labels.clone()
    labels[::4] = 3
    for name, pixels, wanted in (("suspect", poisoned, labels), ("clean", learnt.pixels, learnt.labels)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = make(f"{folder / 'net.py'}:make")
            inputs = (pixels / 255 - 0.3) / 0.4 if name == "suspect" else pixels / 255
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            for _ in range(150):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(inputs), wanted).backward()
                optimizer.step()
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    (folder / "grid.toml").write_text(ELSEWHERE)
    return folder


def test_a_suspect_from_elsewhere_is_scored_on_examples_that_carry_its_trigger(elsewhere: Path) -> None:
    bench(str(elsewhere / "grid.toml"), out=str(elsewhere / "runs"))
    store = Store(elsewhere / "runs")
    assert not store.victims()  # nothing is trained
    found = {(spec["victim"]["task"]["name"], spec["method"]["name"]): (spec, result) for spec, result in store.cells()}
    methods = ("none", "fine-tuning", "fe-tuning")
    assert found.keys() == {(task, method) for task in ("suspect", "clean") for method in methods}
    spec, result = found["suspect", "none"]
    assert spec["victim"]["attack"] == {"name": "own", "version": 1, "parameters": {}}
    assert spec["victim"]["task"]["target"] == 3
    assert result["implanted"] is True

    # What `evaluate` says of the same rows: those that are not set aside for clean budgets.
    model, encode = load(elsewhere / "suspect.safetensors", factory=f"{elsewhere}/net.py:make", mean=(0.3,), std=(0.4,))
    test = Dataset.load(elsewhere / "test.parquet", encode)
    rest = [row for row in range(len(test)) if row not in stratified(test.labels, 40, seed=0)]
    expected = evaluate(
        model,
        test.select(rest),
        triggered_data=Dataset.load(elsewhere / "triggered.parquet", encode).select(rest),
        target=3,
        precision="fp32",
    )
    assert result["score"] == expected.to_json()
    assert expected.attack_success is not None
    assert expected.attack_success.n == int((test.labels[rest] != 3).sum())
    tuned_spec, tuned = found["suspect", "fine-tuning"]
    assert tuned_spec["victim"] == spec["victim"]
    assert tuned["implanted"] is True
    assert tuned["score"]["attack_success"]["n"] == expected.attack_success.n

    # A head drawn at random, and left so: the cell is kept and says that nobody should use the model.
    assert {key[1]: result["usable"] for key, (_, result) in found.items() if key[0] == "clean"} == {
        "none": None,
        "fine-tuning": True,
        "fe-tuning": False,
    }
    wreck = found["clean", "fe-tuning"][1]
    assert (wreck["status"], wreck["warnings"][0][:37]) == ("done", "The purified model is not usable: its")

    spec, result = found["clean", "none"]  # which never was poisoned: a control, and also shown the trigger
    assert (spec["victim"]["attack"]["name"], result["implanted"]) == ("none", None)
    assert result["score"]["attack_success"]["value"] < 0.5


def test_a_suspect_that_auto_hands_back_is_a_result_like_others(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is wrong with the suspect: its cell counts, and has no mark of a damaged model."""
    wreck = purifiers.FETuning(epochs=1, learning_rate=1e-9)
    monkeypatch.setattr("unbackdoor.purifiers.auto.methods_to_try", lambda *_: [wreck])
    auto = '[[methods]]\nname = "auto"\ndetectors = ["margin"]\n[[budgets]]\nn = 30\n'
    (elsewhere / "auto.toml").write_text(ELSEWHERE.partition("[tasks.clean]")[0] + auto)
    bench(str(elsewhere / "auto.toml"), out=str(tmp_path / "runs"))
    found = {spec["method"]["name"]: result for spec, result in Store(tmp_path / "runs").cells()}
    assert (found["auto"]["status"], found["auto"]["usable"]) == ("done", True)
    assert found["auto"]["warnings"][0].startswith("Nothing was purified: no method lost at most 10 points")
    assert found["auto"]["score"] == found["none"]["score"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("target = 3", "target = 4"),
        ("mean = 0.3", "mean = 0.25"),
        ("net.py:make", "other.py:make"),
        ("triggered.parquet", "test.parquet"),
    ],
)
def test_what_a_suspect_from_elsewhere_is_asked_with_is_part_of_its_identity(
    old: str, new: str, elsewhere: Path
) -> None:
    (elsewhere / "other.py").write_text(FACTORY + "# changed\n")

    def keys(text: str) -> set[str]:
        (elsewhere / "asked.toml").write_text(text)
        return {cell.key for cell in all_cells(read(elsewhere / "asked.toml")) if cell.subject.name == "suspect"}

    before = keys(ELSEWHERE)
    assert len(before) == 3
    assert not keys(ELSEWHERE.replace(old, new)) & before


def test_a_clean_model_next_to_a_suspect_from_elsewhere_is_shown_its_trigger(elsewhere: Path) -> None:
    text = ELSEWHERE.partition("[tasks.clean]")[0].replace("mean", 'control = "clean.safetensors"\nmean')
    (elsewhere / "beside.toml").write_text(text + "[[methods]]" + ELSEWHERE.partition("[[methods]]")[2])
    bench(str(elsewhere / "beside.toml"), out=str(elsewhere / "runs-beside"))
    found = {
        (spec["victim"]["attack"]["name"], spec["method"]["name"]): (spec, result)
        for spec, result in Store(elsewhere / "runs-beside").cells()
    }
    spec, victim = found["own", "none"]
    control = found["none", "none"][1]
    assert control["flips"].keys() == {identity(spec["victim"])}
    assert control["flips"][identity(spec["victim"])]["n"] == victim["score"]["attack_success"]["n"]
    assert "attack_success" not in control["score"]


def test_triggered_examples_that_are_not_the_test_rows_need_clean_examples_of_their_own(
    elsewhere: Path, digits: Dataset
) -> None:
    write_pictures(digits.select(range(400, 450)), elsewhere / "others.parquet")
    text = ELSEWHERE.partition("[tasks.clean]")[0].replace("triggered.parquet", "others.parquet")
    text += "[[methods]]" + ELSEWHERE.partition("[[methods]]")[2]
    (elsewhere / "others.toml").write_text(text)
    with pytest.raises(IncompleteError, match=r"others.parquet must hold the rows of test.parquet in their order"):
        bench(str(elsewhere / "others.toml"), out=str(elsewhere / "runs-others"))
    write_pictures(digits.select(range(60)), elsewhere / "budget.parquet")
    (elsewhere / "others.toml").write_text(text.replace("held_out = 40", 'clean = "budget.parquet"'))
    bench(str(elsewhere / "others.toml"), out=str(elsewhere / "runs-others"))
    scores = [result["score"] for _, result in Store(elsewhere / "runs-others").cells() if result["status"] == "done"]
    others = digits.labels[400:450]
    assert {score["attack_success"]["n"] for score in scores} == {int((others != 3).sum())}


def test_a_full_disk_loses_nothing(place: Path, tmp_path: Path, drive: Drive) -> None:
    runs = tmp_path / "runs"
    assert drive("full", str(place / "tiny.toml"), runs) == 1
    *_, last = (tmp_path / "runs.errors").read_text().splitlines()
    assert last.endswith(".json could not be written: File too large. Nothing of it was kept; free some space.")
    kept = [json.loads(path.read_text()) for path in (runs / "cells").iterdir()]
    assert len(kept) >= 1
    assert not Store(runs).failed()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "`workers` must be at least 1, got 0."),
        ({"workers": 2, "ray": "auto"}, "bench takes `workers` or `ray`, got both. Leave one out."),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        bench("grid.toml", out="runs", **options)
    assert str(caught.value) == message


def test_a_run_that_is_stopped_while_it_plans_says_that_cells_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It said that nothing was kept, of a store with thousands of cells."""

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unbackdoor._bench.run.read", stopped)
    with pytest.raises(UnbackdoorError) as end:
        bench("grid.toml", out="runs")
    assert str(end.value) == "Interrupted; finished cells are kept. Start the same command to go on."
    assert end.value.exit_code == 130
