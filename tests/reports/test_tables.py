"""The numbers of a report by hand, and the tables made of them."""

import csv
import io
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import unbackdoor
from stores import CONTROL, MACHINE, TRIGGERED, N, failure, provenance, put_many, result, share, spec, victim
from unbackdoor import UnbackdoorError
from unbackdoor._bench import Store, identity
from unbackdoor._cli.app import main
from unbackdoor._reports.store import writers
from unbackdoor._reports.store.build import build
from unbackdoor._reports.store.numbers import MEASURES, Report, Row
from unbackdoor._reports.store.page import render
from unbackdoor._reports.store.run import write_report

HOSTILE = "<script>alert(1)</script> </script> ]]> \"'` | \\ & $x_1^2$ {%}#~ =cmd\nnext"
BADNETS, WEAK = victim(), victim("blended", 0.01)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A victim with two methods, a control, a victim in which the attack did not take, and a failure."""
    made = Store(tmp_path / "runs")
    flips = {identity(BADNETS): share(0.02, TRIGGERED), identity(WEAK): share(0.0, TRIGGERED)}
    made.put(spec(BADNETS, "none"), result(0.96, 1.0, method=None, seconds=0.0))
    for seed, (accuracy, success) in enumerate([(0.94, 0.1), (0.92, 0.2), (0.93, 0.6)]):
        made.put(spec(BADNETS, "fst", seed), result(accuracy, success, seconds=4.0 + seed))
    made.put(spec(BADNETS, "fine-tuning"), result(0.95, 0.9))
    made.put(spec(BADNETS, "fine-tuning", 1), failure("It failed in /home/somebody/data.parquet, sadly."))
    made.put(spec(CONTROL, "none"), result(0.97, flips=flips))
    made.put(spec(CONTROL, "fst"), result(0.91, flips={**flips, identity(BADNETS): share(0.04, TRIGGERED)}))
    made.put(spec(CONTROL, "fst", 1), result(0.89, flips={**flips, identity(BADNETS): share(0.08, TRIGGERED)}))
    made.put(spec(WEAK, "none"), result(0.97, 0.3, implanted=False))
    made.put(spec(WEAK, "fst"), result(0.5, 0.0, implanted=False))
    return made


def of(store: Store) -> Report:
    return build(store, "runs")[0]


def row(made: Report, **wanted: Any) -> Row:
    found = [each for each in made.rows if all(getattr(each, name) == value for name, value in wanted.items())]
    assert len(found) == 1, found
    return found[0]


def test_mean_standard_deviation_and_n_are_those_by_hand(store: Store) -> None:
    fst = row(of(store), attack="badnets", method="fst")
    assert fst.attack_success is not None
    assert fst.attack_success.mean == pytest.approx(0.3)  # (0.1 + 0.2 + 0.6) / 3
    assert fst.attack_success.sd == pytest.approx(0.07**0.5)  # (0.04 + 0.01 + 0.09) / 2
    assert (fst.attack_success.n, fst.attack_success.least, fst.attack_success.most) == (3, 0.1, 0.6)
    assert fst.clean_accuracy is not None
    assert [fst.clean_accuracy.mean, fst.clean_accuracy.sd] == pytest.approx([0.93, 0.01])
    assert fst.accuracy_lost is not None
    assert fst.accuracy_lost.mean == pytest.approx(0.03)  # 0.96 before the method
    assert fst.recovered_accuracy is not None
    assert fst.recovered_accuracy.mean == pytest.approx(0.7)
    assert fst.seconds is not None
    assert fst.seconds.mean == 5.0
    assert (fst.counted, fst.seeds, fst.victim_seeds, fst.clean_n, fst.triggered_n) == (
        3,
        (0, 1, 2),
        (0,),
        N,
        TRIGGERED,
    )


def test_a_single_run_has_no_spread_but_its_interval(store: Store) -> None:
    tuned = row(of(store), attack="badnets", method="fine-tuning")
    assert tuned.attack_success is not None
    assert tuned.attack_success.sd is None
    assert tuned.attack_success.interval == (share(0.9, TRIGGERED)["low"], share(0.9, TRIGGERED)["high"])
    assert tuned.failed == 1


def test_the_control_put_through_the_same_method_stands_beside(store: Store) -> None:
    made = of(store)
    fst = row(made, attack="badnets", method="fst")
    assert fst.flip_rate is not None
    assert fst.flip_rate.mean == pytest.approx(0.06)  # seeds 0 and 1; the control has no seed 2
    assert fst.flip_rate.n == 2
    assert fst.control_accuracy is not None
    assert fst.control_accuracy.mean == pytest.approx(0.9)
    came = row(made, attack="badnets", method="none")
    assert came.flip_rate is not None
    assert came.flip_rate.mean == pytest.approx(0.02)


def test_attacks_that_did_not_implant_are_in_no_average_and_seen(store: Store) -> None:
    made = of(store)
    weak = row(made, attack="blended", method="fst")
    assert (weak.clean_accuracy, weak.attack_success, weak.counted, weak.not_implanted) == (None, None, 0, 1)
    assert [(each.attack, each.rate, each.seed, each.success, each.cells) for each in made.left_out] == [
        ("blended", 0.01, 0, 0.3, 2)
    ]
    assert writers.entry(weak) == "† not implanted (1)"
    assert [cell.status for cell in made.cells if made.rows[cell.row] == weak] == ["left out"]


def test_of_two_victim_seeds_the_one_that_took_counts(store: Store) -> None:
    store.put(spec(victim(seed=1), "fst"), result(0.1, 0.0, implanted=False))
    fst = row(of(store), attack="badnets", method="fst")
    assert (fst.counted, fst.not_implanted, fst.victim_seeds) == (3, 1, (0,))
    assert fst.clean_accuracy is not None
    assert fst.clean_accuracy.mean == pytest.approx(0.93)
    assert writers.entry(fst).endswith("n = 3 († 1 left out)")


def test_victim_seeds_of_one_setting_are_averaged(store: Store) -> None:
    store.put(spec(victim(seed=1), "fst"), result(0.97, 0.3))
    fst = row(of(store), attack="badnets", method="fst")
    assert (fst.counted, fst.victim_seeds) == (4, (0, 1))
    assert fst.accuracy_lost is not None
    assert fst.accuracy_lost.n == 3  # how the second victim came is not known


@pytest.mark.parametrize(
    "other",
    [
        spec(BADNETS, "fst", 9, alpha=0.2),
        spec(BADNETS, "fst", 9, n=100),
        {**spec(BADNETS, "fst", 9), "clean": {"from": "train", "n": 200, "seed": 0, "data": "b" * 64}},
        {**spec(BADNETS, "fst", 9), "clean": {"from": "unseen", "n": 200, "seed": 0, "data": "c" * 64}},
        {**spec(BADNETS, "fst", 9), "clean": {"from": "unseen", "n": 200, "seed": 1, "data": "b" * 64}},
        {**spec(BADNETS, "fst", 9), "proxy": "d" * 64},
        {**spec(BADNETS, "fst", 9), "method": {"name": "fst", "version": 2, "parameters": {}}},
        spec(victim(rate=0.050001), "fst", 9),
        spec(victim(rate=None), "fst", 9),
        spec(victim(parameters={"size": 5}), "fst", 9),
        spec(victim(task={"width": 16}), "fst", 9),
        spec(victim(task={"test": "e" * 64}), "fst", 9),
        spec({**victim(), "model": "f" * 64, "trigger": "0" * 64}, "fst", 9),
    ],
)
def test_different_settings_are_never_merged(store: Store, other: dict[str, Any]) -> None:
    before = of(store)
    store.put(other, result(0.1, 0.0))
    made = of(store)
    assert len(made.rows) == len(before.rows) + 1
    names = [(each.task, each.attack, each.rate, each.budget, each.method) for each in made.rows]
    assert len(set(names)) == len(names)
    places = [place for block in made.blocks for line in block.cells for place in line if place is not None]
    assert set(places) == set(range(len(made.rows)))


def test_fine_tuning_stands_in_every_table_even_where_it_was_not_run(store: Store) -> None:
    store.put(spec(BADNETS, "fst", n=50), result(0.9, 0.5))
    made = of(store)
    assert {block.budget for block in made.blocks} == {"200 unseen", "50 unseen"}
    for block in made.blocks:
        assert block.methods[:2] == ("none", "fine-tuning")
    [bare] = [block for block in made.blocks if block.budget == "50 unseen"]
    assert set(bare.cells[1]) == {None}
    assert "digits has no plain fine-tuning with the clean budget 50 unseen." in made.notes


def test_worst_and_mean_are_over_the_attacks_that_a_method_was_run_on(store: Store) -> None:
    sig = victim("sig", 0.05)
    store.put(spec(sig, "none"), result(0.96, 0.9, method=None))
    store.put(spec(sig, "fst"), result(0.96, 0.5))
    made = of(store)
    [block] = made.blocks
    over = dict(zip(block.methods, block.over, strict=True))
    assert over["fst"] is not None
    assert (over["fst"].most, over["fst"].mean, over["fst"].n) == pytest.approx((0.5, 0.4, 2))  # badnets 0.3, sig 0.5
    assert over["fine-tuning"] is not None
    assert over["fine-tuning"].n == 1
    page = writers.as_markdown(made, "x.md")
    assert "| method | worst, mean | clean control |" in page
    assert "| fst | 50.0, 40.0 of 2 |" in page
    assert "| fine-tuning | 90.0, 90.0 of 1 |" in page
    assert "fst & 50.0, 40.0 of 2 &" in writers.as_latex(made)


def test_an_attack_on_which_nothing_was_run_has_no_column(store: Store) -> None:
    store.put(spec(victim("sig", 0.05), "none"), result(0.96, 0.9, method=None))
    [block] = of(store).blocks
    assert block.columns == ("clean control", "badnets 5 %", "blended 1 %")
    assert "sig" in {each.attack for each in of(store).rows}


def test_a_label_is_the_name_where_all_cells_have_it(tmp_path: Path) -> None:
    made = Store(tmp_path / "runs")
    wide = {**provenance(), "labels": {"method": "wide <b>"}}
    made.put(spec(BADNETS, "none"), result(0.96, 1.0, method=None))
    made.put(spec(BADNETS, "fst", alpha=0.3), result(0.9, 0.1, provenance=wide))
    assert {each.method for each in of(made).rows} == {"none", "wide <b>"}
    made.put(spec(BADNETS, "fst", 1, alpha=0.3), result(0.9, 0.1))  # another grid did not call it so
    assert {each.method for each in of(made).rows} == {"none", "fst (alpha=0.3)"}


def test_the_same_attack_in_two_tasks_has_its_plain_name(tmp_path: Path) -> None:
    made = Store(tmp_path / "runs")
    existing = {**victim(task={"name": "other"}), "model": "c" * 16, "trigger": "d" * 16}
    for of_ in (BADNETS, existing):
        made.put(spec(of_, "none"), result(0.96, 1.0, method=None))
    assert [(each.task, each.attack) for each in of(made).rows] == [("digits", "badnets"), ("other", "badnets")]


def test_a_method_without_clean_examples_stands_next_to_every_budget(store: Store) -> None:
    store.put(spec(BADNETS, "clp", n=None), result(0.9, 0.5))
    store.put(spec(BADNETS, "fst", n=50), result(0.9, 0.5))
    assert all("clp" in block.methods for block in of(store).blocks)


def test_all_to_all_stands_apart(store: Store) -> None:
    rule = {"label_rule": "all-to-all"}
    store.put(spec(victim(parameters=rule), "fst"), result(0.9, 0.5, label_rule="all-to-all"))
    blocks = of(store).blocks
    assert [block.apart for block in blocks] == [False, True]
    assert blocks[1].columns == ("clean control", "badnets (label_rule=all-to-all) 5 %")
    assert "badnets (label_rule=all-to-all) 5 %" not in blocks[0].columns


def test_pandas_gets_the_numbers_of_the_csv(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = unbackdoor.report(store.address)
    frame = made.to_pandas()
    lines = list(csv.DictReader(io.StringIO(writers.as_csv(made))))
    assert list(frame.columns) == list(lines[0])
    for line, mean in zip(lines, frame["clean_accuracy_mean"], strict=True):
        assert (line["clean_accuracy_mean"] == "" and mean != mean) or float(line["clean_accuracy_mean"]) == mean
    assert list(frame["seeds"]) == [row.seeds for row in made.rows]
    assert frame[frame.method == "fst"].attack_success_n.sum() > 0
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UnbackdoorError) as refusal:
        made.to_pandas()
    assert str(refusal.value) == "Report.to_pandas needs pandas. Install it: pip install pandas."


def put_raw(store: Store, of: dict[str, Any], content: dict[str, Any]) -> None:
    """Write a cell that `Store.put` would refuse."""
    store.place.write(f"cells/{identity(of)}.json", json.dumps({"version": 1, "spec": of, "result": content}))


def test_the_notes_name_what_is_missing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(spec(BADNETS, "fst"), result(0.9, 0.5, implanted=None))
    put_raw(store, {"victim": {"task": "old"}, "seed": 0}, {"score": {}})
    made = of(store)
    notes = "\n".join(made.notes)
    assert "1 cell has another form than today's" in notes
    assert "digits has no clean control" in notes
    assert "it is not known whether the attack was implanted" in notes
    assert writers.entry(made.rows[0]).endswith("n = 1?")


def test_what_is_the_same_for_several_tasks_is_said_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for task in ("b", "a"):
        store.put(spec(victim(task={"name": task}), "fst"), result(0.9, 0.5))
    lines = writers.as_markdown(of(store), "page.md").splitlines()
    of_all = f"scored on {N:,} clean and {TRIGGERED:,} triggered test examples."
    assert f"- **n**: a, b: each 1 finished cell, 0 failed; {of_all}" in lines
    assert "- All 2 tasks have no clean control: what a method does to a clean model is not known." in lines
    store.put(spec({**CONTROL, "task": victim(task={"name": "b"})["task"]}, "none"), result(0.9))
    lines = writers.as_markdown(of(store), "page.md").splitlines()
    assert f"- **n**: a: 1 finished cell, 0 failed; {of_all}" in lines
    assert "- a has no clean control: what a method does to a clean model is not known." in lines


@pytest.mark.parametrize("value", [float("nan"), 7, "0.5", None, True])
def test_a_number_that_is_none_is_in_no_table(store: Store, value: Any) -> None:
    odd = result(0.9, 0.5)
    odd["score"]["clean_accuracy"]["value"] = value
    put_raw(store, spec(BADNETS, "odd"), odd)
    assert all(each.method != "odd" for each in of(store).rows)


def brief(accuracy: float, success: float) -> dict[str, Any]:
    return {"clean_accuracy": share(accuracy, N), "attack_success": share(success, TRIGGERED)}


LOSS = {"value": 1.5, "n": 20, "low": 1.25, "high": 1.75, "tokens": 200}
REACHES = ("clean", "clean_perturbed", "triggered")
STRESS = {
    "model": "out",
    "victim": "victim",
    "control": "control",
    "format": 1,
    "before": {"purified": brief(0.9, 0.1), "control": brief(0.95, 0.0)},
    "retuning": {"purified": {"runs": [{"k": 5, "seed": s, **brief(0.9, v)} for s, v in ((0, 0.2), (1, 0.4))]}},
    "reactivation": {
        "teacher": {"k": 5, **brief(0.9, 0.9)},
        "models": {
            "purified": {
                **{name: share(0.1, TRIGGERED) for name in REACHES},
                "triggered_perturbed": share(0.7, TRIGGERED),
            }
        },
    },
    "path": None,
    "path_ends_recomputed": None,
    "attack": {"name": "badnets", "parameters": {}},
    "label_rule": "all-to-one",
    "target": 0,
    "parts": ["retune", "reactivation"],
    "counts": [5],
    "seeds": [0, 1],
    "clean": {"n": 200, "attackable": 180},
    "scored_on": {"n": N, "triggered": TRIGGERED, "note": "the whole test set"},
    "settings": {},
    "notes": [],
    "warnings": [],
    "seconds": 1.0,
    "device": MACHINE,
    "versions": {"unbackdoor": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
}


def test_stress_is_read_from_cells_and_files(store: Store) -> None:
    assert of(store).stress == ()
    store.put(spec(BADNETS, "fst"), result(0.94, 0.1, stress=STRESS))
    store.place.write("stress/one/stress.json", json.dumps(STRESS))
    store.place.write("stress/two.json", json.dumps({**STRESS, "retuning": None, "reactivation": None}))
    found = of(store).stress
    assert [(each.source, each.model) for each in found[2:]] == [
        (name, model) for name in ("one", "two") for model in ("purified", "control")
    ]
    assert found[0].source == "digits, badnets 5 %: fst, 200 unseen, victim seed 0, seed 0"
    [retuned] = found[2].retuned
    assert (retuned.k, retuned.n, found[2].reactivated) == (5, 2, 0.7)
    assert (retuned.mean, retuned.sd) == pytest.approx((0.3, 0.02**0.5))
    assert (found[4].retuned, found[4].reactivated) == ((), None)
    assert "| one | purified | 10.0 | 30.0 (14.1) | 70.0 |" in writers.as_markdown(of(store), "x")


def test_stress_of_a_language_model_has_a_loss(store: Store) -> None:
    before = {"purified": {"clean_loss": LOSS, "attack_success": share(0.1, TRIGGERED)}}
    store.place.write("stress/one.json", json.dumps({**STRESS, "before": before}))
    [found] = of(store).stress
    assert (found.clean_accuracy, found.clean_loss, found.attack_success) == (None, 1.5, 0.1)


def test_a_loss_of_a_cell_that_is_none_is_refused(store: Store) -> None:
    before = {"purified": {"clean_loss": {**LOSS, "value": math.nan}}}
    put_raw(store, spec(BADNETS, "fst"), result(0.94, 0.1, stress={**STRESS, "before": before}))
    with pytest.raises(UnbackdoorError, match=rf"^the cell {identity(spec(BADNETS, 'fst'))} holds no stress test"):
        of(store)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[" * 100_000,
        '{"format": 99, "before": {}}',
        '{"format": 1, "before": {}}',
        '{"format": 1, "before": {"purified": {"clean_accuracy": {"value": 7}}}}',
        json.dumps({**STRESS, "format": 2}),
        json.dumps({**STRESS, "before": {"purified": {"clean_accuracy": {**share(0.9, N), "value": 7}}}}),
        json.dumps({**STRESS, "retuning": {"purified": {"runs": [{"k": math.inf, "seed": 0, **brief(0.9, 0.5)}]}}}),
        json.dumps({**STRESS, "before": {"purified": {"clean_loss": {**LOSS, "value": math.nan}}}}),
    ],
)
def test_a_foreign_stress_file_is_refused(store: Store, text: str) -> None:
    store.place.write("stress/odd.json", text)
    with pytest.raises(
        UnbackdoorError, match=r"odd\.json holds no stress test that unbackdoor stress wrote\. Remove it"
    ):
        of(store)


def test_csv_agrees_with_the_numbers(store: Store) -> None:
    made = of(store)
    lines = list(csv.DictReader(io.StringIO(writers.as_csv(made))))
    assert len(lines) == len(made.rows)
    for line, each in zip(lines, made.rows, strict=True):
        assert (line["task"], line["attack"], line["method"], int(line["counted"])) == (
            each.task,
            each.attack,
            each.method,
            each.counted,
        )
        for name in MEASURES:
            spread = getattr(each, name)
            assert line[f"{name}_mean"] == ("" if spread is None else str(spread.mean))
            assert line[f"{name}_sd"] == ("" if spread is None or spread.sd is None else str(spread.sd))
            assert line[f"{name}_n"] == ("" if spread is None else str(spread.n))


def test_json_is_the_numbers(store: Store) -> None:
    made = of(store)
    read = json.loads(writers.as_json(made))
    assert read == json.loads(json.dumps(made.to_json()))
    fst = next(each for each in read["rows"] if (each["attack"], each["method"]) == ("badnets", "fst"))
    assert fst["attack_success"]["mean"] == pytest.approx(0.3)


def test_json_of_another_form_is_not_written(store: Store) -> None:
    with pytest.raises(ValidationError, match=r"rows\.0\.counted"):
        writers.as_json(replace(of(store), rows=(replace(of(store).rows[0], counted=-1),)))


def test_markdown_and_latex_have_the_same_entries(store: Store) -> None:
    made = of(store)
    page, tex = writers.as_markdown(made, "digits.md"), writers.as_latex(made)
    assert "| fst | 90.0 (1.4), n = 2 | 93.0 (1.0) / 30.0 (26.5), n = 3 | † not implanted (1) |" in page
    assert "fst & 90.0 (1.4), n = 2 & 93.0 (1.0) / 30.0 (26.5), n = 3 & $^\\dagger$ not implanted (1) \\\\" in tex
    assert "| fine-tuning | not run | 95.0 / 90.0, n = 1 (1 failed) | not run |" in page


def test_a_method_that_cost_a_model_its_use_is_kept_and_marked(store: Store) -> None:
    assert "§" not in writers.as_markdown(of(store), "digits.md")
    store.put(spec(BADNETS, "anp"), result(0.4, 0.0, usable=False))
    store.put(spec(BADNETS, "anp", 1), result(0.9, 0.1, usable=True))
    made = of(store)
    assert row(made, attack="badnets", method="anp").unusable == 1
    page = writers.as_markdown(made, "digits.md")
    assert "| anp | not run | 65.0 (35.4) / 5.0 (7.1), n = 2 (§ 1 not usable) | not run |" in page
    assert "A section sign (§): the method cost the model its use" in page
    assert "n = 2 (\\S{} 1 not usable)" in writers.as_latex(made)


def test_a_control_that_was_shown_triggered_examples_shows_how_often_it_flips(tmp_path: Path) -> None:
    made = Store(tmp_path / "runs")
    made.put(spec(CONTROL, "fine-tuning"), result(0.9, 0.04, implanted=None))
    assert "| fine-tuning | 90.0 / 4.0, n = 1 |" in writers.as_markdown(of(made), "digits.md")


def test_second_test_examples_have_a_table_of_their_own(store: Store) -> None:
    assert "second test examples" not in writers.as_markdown(of(store), "digits.md")
    more = {"clean_accuracy": share(0.7, 500), "attack_success": share(0.25, 400), "per_class": {}}
    alone = {"clean_accuracy": share(0.8, 500), "per_class": {}}
    store.put(spec(BADNETS, "fst", 0), result(0.94, 0.1, second_test=more))
    store.put(spec(CONTROL, "none"), result(0.97, flips={}, second_test=alone))
    made = of(store)
    fst = row(made, attack="badnets", method="fst")
    assert fst.second_success is not None
    assert (fst.second_success.mean, fst.second_success.n) == (0.25, 1)
    page = writers.as_markdown(made, "digits.md")
    table = page.split("second test examples")[1]
    assert "| none | 80.0 | not run | † not implanted (1) |" in table
    assert "| fst | not run | 70.0 / 25.0 | † not implanted (1) |" in table
    assert "| fst | 90.0 (1.4), n = 2 | 93.0 (1.0) / 30.0 (26.5), n = 3 |" in page


def guarded(missed: float, alarms: float, **more: Any) -> dict[str, Any]:
    """A finished cell of a guard, asked for 1 and 5 % false alarms; at 5 % it misses half as many attacks."""
    area = {**share(0.9, N + TRIGGERED), "clean": N, "triggered": TRIGGERED}
    scores = [
        {
            "false_alarms": share(alarms * factor, N),
            "missed_attacks": share(missed / factor, TRIGGERED),
            "auc": area,
            "accuracy_of_what_passes": share(0.96, 900),
            "accuracy_without_guard": share(0.95, N),
            "attack_success": share(missed / factor, TRIGGERED),
            "attack_success_without_guard": share(1.0, TRIGGERED),
            "forwards_per_input": {"value": 17.0, "reference": 0.0, "n": N + TRIGGERED},
            "label_rule": "all-to-one",
        }
        for factor in (1, 2)
    ]
    entries = [
        {"false_alarms": asked, "threshold": 0.5, "score": score}
        for asked, score in zip((0.01, 0.05), scores, strict=True)
    ]
    numbers = {"measure": "m", "fitted_on": 50, "threshold_on": 50, "fitting_seconds": 1.0, "at": entries}
    return {**result(0.95, 1.0), "guard": numbers, **more}


def guard_spec(of: dict[str, Any], seed: int) -> dict[str, Any]:
    described = spec(of, "strip", seed)
    return {**described, "method": {**described["method"], "kind": "guard", "false_alarms": [0.01, 0.05]}}


def test_guards_have_a_row_for_each_share_of_false_alarms(store: Store) -> None:
    store.put(guard_spec(BADNETS, 0), guarded(0.2, 0.01))
    store.put(guard_spec(BADNETS, 1), guarded(0.4, 0.03))
    store.put(guard_spec(BADNETS, 2), failure("It failed in /home/somebody/guard.json, too."))
    store.put(guard_spec(WEAK, 0), guarded(1.0, 0.01, implanted=False))
    made = of(store)
    assert made.rows == replace(made, guards=()).rows
    assert "strip" not in {each.method for each in made.rows}
    first, second, weak, _ = made.guards
    assert [(each.attack, each.guard, each.asked) for each in (first, second, weak)] == [
        ("badnets", "strip", 0.01),
        ("badnets", "strip", 0.05),
        ("blended", "strip", 0.01),
    ]
    assert first.missed is not None
    assert second.missed is not None
    assert [first.missed.mean, first.missed.sd, second.missed.mean] == pytest.approx([0.3, 0.02**0.5, 0.15])
    assert first.false_alarms is not None
    assert first.false_alarms.mean == pytest.approx(0.02)
    assert (first.counted, first.failed, first.seeds) == (2, 1, (0, 1))
    assert (weak.missed, weak.counted, weak.not_implanted) == (None, 0, 1)  # in no average, and seen
    json.loads(writers.as_json(made))
    text = writers.as_markdown(made, "made.md")
    line = next(line for line in text.splitlines() if line.startswith("| digits | 200 unseen | badnets 5 % | strip"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *("digits", "200 unseen", "badnets 5 %", "strip", "1 %", "2.0 (sd 1.4)", "30.0 (sd 14.1)"),
        *("0.900 (sd 0.000)", "30.0 (sd 14.1)", "100.0 (sd 0.0)", "96.0 (sd 0.0)", "95.0 (sd 0.0)", "17.00"),
        *("1,000 clean, 100 triggered", "2 (1 failed)"),
    ]
    assert "- strip: It failed in …/guard.json, too." in text
    assert "30.0 (sd 14.1)" in writers.as_latex(made)


def test_a_store_of_guards_alone_has_their_table(tmp_path: Path) -> None:
    made = Store(tmp_path / "runs")
    made.put(guard_spec(BADNETS, 0), guarded(0.2, 0.01))
    report = of(made)
    assert (report.rows, len(report.guards)) == ((), 2)
    assert len(list(csv.reader(io.StringIO(writers.as_csv(report))))) == 1  # the heading
    assert "20.0 (13.3 to 28.9)" in writers.as_markdown(report, "made.md")  # Wilson's interval of 20 of 100


def test_a_results_page_says_how_it_was_measured_without_local_paths(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    write_report(store.address, str(out))
    page = out.read_text()
    for part in (
        "unbackdoor bench runs/grids/digits-0123abcd.toml --out runs",
        "unbackdoor report runs -o page.md",
        "**Commit**: 0123abc.",
        f"**Machine**: {MACHINE}.",
        "of the purification 0, 1, 2; of the victims 0.",
        "digits: 10 finished cells, 1 failed; scored on 1,000 clean and 100 triggered test examples.",
        "blended 1 %, victim seed 0: the attack was not implanted (attack success was 30.0 % before any method; ",
        "- 1 of fine-tuning: It failed in …/data.parquet, sadly.",
    ):
        assert part in page
    assert str(tmp_path) not in page
    assert "somebody" not in page


@pytest.fixture
def hostile(tmp_path: Path) -> Store:
    """Every text that a store can hold is one that wants to be markup."""
    store = Store(tmp_path / "hostile")
    task = {"name": HOSTILE}
    of = victim(HOSTILE, task=task)
    made = result(0.9, 0.5)
    made["provenance"] = {**made["provenance"], "device": HOSTILE, "commit": HOSTILE, "grid": f"../{HOSTILE}.toml"}
    made["warnings"] = [HOSTILE]
    store.put(spec(of, HOSTILE, text=HOSTILE), made)
    store.put(spec(of, "=cmd|' /C calc'!A0"), made)
    store.put(spec(of, "none"), {**made, "implanted": False})
    store.put(spec(of, "-1+1"), failure(HOSTILE))
    store.place.write("stress/x.json", json.dumps(STRESS))
    return store


def test_hostile_text_does_not_end_the_page_or_its_script(hostile: Store) -> None:
    made, records = build(hostile, "runs", whole=True)
    page = render(made, records, hostile)
    assert "<script>alert" not in page
    assert page.count("</script>") == 3  # numbers, one pack, the script itself
    assert page.count("<script") == 3


def test_hostile_text_is_no_formula_in_csv(hostile: Store) -> None:
    lines = list(csv.reader(io.StringIO(writers.as_csv(of(hostile)))))
    assert {len(line) for line in lines} == {len(lines[0])}
    texts = [entry for line in lines[1:] for entry in line if entry]
    assert "'=cmd|' /C calc'!A0" in texts
    for entry in texts:
        assert entry[0] not in "=+-@\t\r" or re.fullmatch(r"-?[\d.e-]+", entry)


def test_hostile_text_is_text_in_latex_and_markdown(hostile: Store) -> None:
    tex = writers.as_latex(of(hostile))
    body = "\n".join(line for line in tex.split("\n") if not line.startswith("%"))
    assert r"\$x\_1\textasciicircum{}2\$ \{\%\}\#\textasciitilde{} =cmd next" in body
    assert re.search(r"(?<!\\)[$#_~^%]", re.sub(r"\$\^\\dagger\$", "", body)) is None
    page = writers.as_markdown(of(hostile), "x")
    assert "<" not in page
    tables = [line for line in page.split("\n") if line.startswith("| ")]
    assert all(line.endswith(" |") for line in tables)


def test_a_record_cannot_name_a_file_outside_the_grids(store: Store, tmp_path: Path) -> None:
    (tmp_path / "secret.toml").write_text("my own secret")
    odd = result(0.9, 0.5)
    odd["provenance"]["grid"] = "../../secret.toml"
    store.put(spec(BADNETS, "odd"), odd)
    made, records = build(store, "runs", whole=True)
    assert "my own secret" not in render(made, records, store)


@pytest.mark.parametrize("suffix", ["html", "csv", "json", "tex", "md"])
def test_the_suffix_says_which_kind(
    store: Store, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"new/table.{suffix}"
    with pytest.raises(SystemExit) as ended:
        main(["report", store.address, "-o", str(out)])
    assert ended.value.code == 0
    assert "11 cells in 7 settings, 1 failed" in capsys.readouterr().out
    assert out.stat().st_size > 500


@pytest.mark.parametrize(
    ("runs", "out", "message"),
    [
        ("runs", "report.pdf", r"`out` must end in \.html, \.csv, \.json, \.tex or \.md, got report\.pdf\."),
        ("absent", "report.html", r"absent does not exist\. Give the folder or address that unbackdoor bench wrote"),
        (
            "clean.csv",
            "report.html",
            r"clean\.csv is not a folder\. Give the folder or address that unbackdoor bench wrote",
        ),
        ("empty", "report.html", r"empty has no cell that report can read, got 0 of another form\. Give the folder"),
    ],
)
def test_report_says_why_it_cannot_be_made(
    store: Store, runs: str, out: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("clean.csv").touch()
    with pytest.raises(UnbackdoorError, match=message):
        write_report(runs, out)
    assert not Path(out).exists()


@pytest.mark.parametrize("suffix", [".html", ".csv", ".json", ".tex", ".md"])
def test_a_report_replaces_reports_alone(suffix: str, store: Store, tmp_path: Path) -> None:
    out = tmp_path / f"mine{suffix}"
    out.write_text("a day's work\n")
    with pytest.raises(UnbackdoorError) as refused:
        write_report(store.address, str(out))
    assert str(refused.value) == f"{out} was not written by unbackdoor. Choose another `out`."
    assert out.read_text() == "a day's work\n"
    out.write_text("")
    for _ in range(2):
        write_report(store.address, str(out))
    assert len(out.read_text()) > 100


def test_a_folder_is_no_report(store: Store, tmp_path: Path) -> None:
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(UnbackdoorError, match=r"`out` must be a file, got the folder .*folder\.md\."):
        write_report(store.address, str(tmp_path / "folder.md"))


@pytest.mark.thorough
def test_a_thousand_cells_stay_far_below_five_megabytes(tmp_path: Path) -> None:
    store = put_many(tmp_path / "runs", 1000)
    made, records = build(store, "runs", whole=True)
    assert len(made.cells) >= 1000
    assert len(render(made, records, store)) < 2_000_000
