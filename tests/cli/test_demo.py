"""The demo: with its settings cut short here, and in full among the slow tests."""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch

import unbackdoor as ub
from unbackdoor import Proportion, Score
from unbackdoor._artifacts import directories
from unbackdoor._cli.demos import images as images_demo
from unbackdoor._cli.demos import story
from unbackdoor.purifiers import FST, FineTuning

FILES = ["clean.parquet", "purified", "record.json", "report.html", "test.parquet", "victim"]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demo of one epoch each, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "a demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images_demo, "METHODS", (FineTuning(epochs=1, batch_size=32), FST(epochs=1, batch_size=32)))
        state = torch.random.get_rng_state()
        with contextlib.redirect_stdout(io.StringIO()) as said:
            images_demo.image(out=str(out), overwrite=False, seed=0, epochs=1)
        assert torch.equal(state, torch.random.get_rng_state())
    return out, said.getvalue()


def test_it_writes_what_it_says(short: tuple[Path, str]) -> None:
    out, said = short
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert [path for path in out.parent.iterdir() if path != out] == []
    assert f"Open {out}/report.html" in said
    assert f"evaluate '{out}'/purified --data '{out}'/test.parquet --attack '{out}'/victim/attack.json" in said


def test_its_directories_are_models_that_score_the_same(short: tuple[Path, str]) -> None:
    out, _ = short
    record = json.loads((out / "record.json").read_text())
    test_scores = {}
    for folder, name in (("victim", "suspect"), ("purified", "fst")):
        model, encode = ub.load(out / folder)
        test = ub.Dataset.load(out / "test.parquet", encode)
        assert test.shape == (1, 12, 12)
        measured = ub.evaluate(model, test, attack=out / "victim" / "attack.json", device="cpu", precision="fp32")
        test_scores[name] = measured.to_json()
        for key, part in test_scores[name].items():
            assert record["scores"][name][key] == part
    own = json.loads((out / "purified" / "record.json").read_text())
    assert own["method"]["name"] == "fst"
    assert own["scores"]["purified"]["attack_success"] == test_scores["fst"]["attack_success"]


def test_nothing_that_was_tuned_on_is_scored_on(short: tuple[Path, str]) -> None:
    out, _ = short
    clean, test = (ub.Dataset.load(out / name) for name in ("clean.parquet", "test.parquet"))
    assert (len(clean), len(test)) == (300, 497)
    assert set(torch.bincount(clean.labels).tolist()) <= {29, 30, 31}  # stratified
    everything = images_demo.digits()
    training, rest = everything.split(1000, seed=0)
    assert sorted(_rows(clean) + _rows(test)) == sorted(_rows(rest))
    assert len(training) + len(rest) == 1797


def _rows(data: ub.Dataset) -> list[bytes]:
    return [item.numpy().tobytes() for item in data.items]


def test_the_page_has_the_scores_and_needs_no_network(short: tuple[Path, str]) -> None:
    out, said = short
    page = (out / "report.html").read_text(encoding="utf-8")
    record = json.loads((out / "record.json").read_text())
    assert "http" not in page.replace("http-equiv", "")
    for score in record["scores"].values():
        for key in ("clean_accuracy", "attack_success", "recovered_accuracy", "clean_model_flip_rate"):
            shown = f"{100 * score[key]['value']:.1f}"
            assert f"{shown}\u202f%" in page
            assert f"{shown} %" in said


def test_it_replaces_only_its_own(short: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = short
    with pytest.raises(ub.UnbackdoorError, match=r"exists\. Use `overwrite=True`, or another `out`\."):
        images_demo.image(out=str(out), overwrite=False, seed=0)
    directories.check_free(out, overwrite=True)
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ub.UnbackdoorError, match="was not written by unbackdoor"):
        images_demo.image(out=str(tmp_path), overwrite=True, seed=0)
    assert (tmp_path / "mine.txt").exists()


def test_a_negative_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ub.UnbackdoorError, match=r"^`seed` must be a whole number, at least 0 and less than 2\*\*63, got -1\.$"
    ):
        images_demo.image(out=str(tmp_path / "out"), overwrite=False, seed=-1)


def test_without_scikit_learn_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        ub.UnbackdoorError, match=r'scikit-learn, which is not installed.*pip install "unbackdoor\[demo\]"$'
    ):
        images_demo.image(out=str(tmp_path / "out"), overwrite=False, seed=0)
    assert not list(tmp_path.iterdir())


def test_the_patch_hides_nothing_of_a_digit() -> None:
    data = images_demo.digits()
    changed = ub.Trigger.of(images_demo.ATTACK, data).stamp(data.items) != data.items
    assert isinstance(changed, torch.Tensor)
    assert changed.any(dim=0).sum() == 5  # the white pixels of a 3x3 checkerboard
    assert (data.items[:, :, 9, 9] == 0).float().mean() > 0.85  # the only pixel of the patch inside the 8x8 digit
    assert not data.augment.flip


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_fine_tuning_fails_where_scale_invariant_fst_does_not(seed: int, tmp_path: Path) -> None:
    images_demo.image(out=str(tmp_path / "out"), overwrite=False, seed=seed)
    scores = json.loads((tmp_path / "out" / "record.json").read_text())["scores"]
    suspect, tuned, purified = scores["suspect"], scores["fine-tuning"], scores["scale-invariant-fst"]
    assert suspect["attack_success"]["value"] >= 0.9
    assert tuned["attack_success"]["value"] > 0.5
    assert purified["attack_success"]["value"] <= 0.05
    assert suspect["clean_accuracy"]["value"] - purified["clean_accuracy"]["value"] <= 0.03
    assert purified["clean_model_flip_rate"]["value"] <= 0.05


def shares(right: int) -> Score:
    """Of a victim that answers `right` of 100 as they are labelled, and all triggered ones as the attacker wants."""
    clean, all_ = Proportion(right, 100), Proportion(100, 100)
    return Score(
        clean_accuracy=clean,
        per_class={},
        attack_success=all_,
        recovered_accuracy=Proportion(0, 100),
        clean_model_flip_rate=Proportion(7, 100),
    )


def test_the_columns_of_the_table_stand_apart() -> None:
    names = ["suspect", "fine-tuning", "e-pur+fine-mixing"]
    assert story._table(names, [shares(90)] * 3).splitlines()[:2] == [
        "                                       suspect        fine-tuning  e-pur+fine-mixing",
        "   clean accuracy                       90.0 %             90.0 %             90.0 %",
    ]
    short = story._table(names[:2], [shares(90)] * 2).splitlines()
    assert short[0] == "                                  suspect   fine-tuning"


@pytest.mark.parametrize(
    ("right", "classes", "said"),
    [
        (90, 2, "looks healthy (clean accuracy 90.0 %), but"),
        (53, 2, "has not learnt its task (clean accuracy 53.0 %, near chance);"),
        (
            61,
            2,
            "has not learnt its task (clean accuracy 61.0 %, near chance);",
        ),  # 50 % and a quarter of the rest: 62.5
        (61, 10, "looks healthy (clean accuracy 61.0 %), but"),
        (12, 10, "has not learnt its task (clean accuracy 12.0 %, near chance);"),
    ],
)
def test_a_victim_is_healthy_only_above_chance(right: int, classes: int, said: str) -> None:
    assert story.health(shares(right), classes) == said


def test_the_commands_to_go_on_with_run_as_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make demo` installs into .venv, which is not on the path of whoever copies them."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(Path.cwd() / ".venv" / "bin" / "python"))
    assert "\n   .venv/bin/python -m unbackdoor evaluate demo/purified --data" in story._farewell(Path("demo"))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert "\n   unbackdoor evaluate demo/purified --data" in story._farewell(Path("demo"))
