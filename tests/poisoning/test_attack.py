"""The common part of all attacks: which rows, which labels, how many, who counts as attacked, and attack.json."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from unbackdoor import Dataset, UnbackdoorError, attacks, evaluate, poison
from unbackdoor._artifacts.attack_record import digest
from unbackdoor._poisoning.attack import Attack, LabelRule
from unbackdoor._poisoning.attack_file import as_trigger, describe, load_trigger, save_trigger
from unbackdoor._poisoning.poison import draw
from unbackdoor._poisoning.trigger import Trigger, stamped
from unbackdoor._poisoning.triggered import already_triggered, triggered
from unbackdoor._value import value

PATCH = attacks.BadNets(size=1, margin=0, pattern="solid", target=1)


def pictures(labels: list[int], side: int = 4, channels: int = 1) -> Dataset:
    items = torch.randint(0, 200, (len(labels), channels, side, side), dtype=torch.uint8, generator=seeded(0))
    return Dataset(items=items, labels=torch.tensor(labels), name="d.parquet")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def refusal(function: object, *args: object, **options: object) -> str:
    with pytest.raises(UnbackdoorError) as caught:
        function(*args, **options)
    return str(caught.value)


labels_of_three = st.lists(st.integers(0, 2), min_size=1, max_size=100)


# The draw.


@given(labels=labels_of_three, rate=st.floats(0, 1, exclude_min=True), seed=st.integers(0, 50))
def test_exactly_the_rounded_rate_is_poisoned(labels: list[int], rate: float, seed: int) -> None:
    count = round(rate * len(labels))
    assume(count > 0)
    data = pictures(labels)
    items = data.items.clone()
    made = poison(data, PATCH, rate=rate, seed=seed, classes=3)
    rows = made.rows.tolist()
    assert len(rows) == len(set(rows)) == count
    assert rows == sorted(rows)
    changed = [row for row in range(len(labels)) if not torch.equal(made.data.items[row], items[row])]
    assert changed == rows
    assert made.data.labels.tolist() == [1 if row in rows else label for row, label in enumerate(labels)]
    assert len(made.cover) == 0
    assert torch.equal(data.items, items)
    assert data.labels.tolist() == labels
    again = poison(data, PATCH, rate=rate, seed=seed, classes=3)
    assert torch.equal(again.data.items, made.data.items)


@given(labels=labels_of_three, rate=st.floats(0, 1, exclude_min=True))
def test_all_to_all_moves_each_label_to_the_next(labels: list[int], rate: float) -> None:
    assume(round(rate * len(labels)) > 0)
    made = poison(pictures(labels), replace(PATCH, label_rule="all-to-all"), rate=rate, seed=0, classes=3)
    rows = made.rows.tolist()
    assert made.data.labels.tolist() == [(label + 1) % 3 if row in rows else label for row, label in enumerate(labels)]


@given(labels=labels_of_three, rate=st.floats(0, 1, exclude_min=True))
def test_clean_labels_take_the_target_class_and_keep_all_labels(labels: list[int], rate: float) -> None:
    count = round(rate * len(labels))
    assume(count > 0)
    attack = replace(PATCH, label_rule="clean-label")
    if count <= labels.count(1):
        made = poison(pictures(labels), attack, rate=rate, seed=0, classes=3)
        assert len(made.rows) == count
        assert {labels[row] for row in made.rows} == {1}
        assert made.data.labels.tolist() == labels
        return
    message = refusal(poison, pictures(labels), attack, rate=rate, seed=0, classes=3)
    assert f"wants {count:,} examples" in message
    if labels.count(1) == 0:
        assert message.endswith("class 1, which has 0. Choose another `target`.")
    else:
        largest = float(message.rpartition("The largest possible rate is ")[2].rstrip("."))
        rows = poison(pictures(labels), attack, rate=largest, seed=0, classes=3).rows
        assert rows.tolist() == [row for row, label in enumerate(labels) if label == 1]


def test_the_target_class_is_drawn_from_like_any_other() -> None:
    labels = torch.arange(1000) % 10
    drawn = sum(torch.bincount(labels[draw(PATCH, labels, rate=0.2, seed=seed)], minlength=10) for seed in range(50))
    # 10,000 draws, 1,000 expected of each class with a deviation of about 30.
    assert (drawn - 1000).abs().max() < 120


def test_another_seed_draws_other_rows() -> None:
    labels = torch.zeros(100, dtype=torch.int64)
    assert len({tuple(draw(PATCH, labels, rate=0.1, seed=seed).tolist()) for seed in range(5)}) == 5


def test_python_rounds_halves_to_even() -> None:
    labels = torch.zeros(50, dtype=torch.int64)
    assert len(draw(PATCH, labels, rate=0.05, seed=0)) == 2  # 2.5
    assert len(draw(PATCH, labels, rate=0.07, seed=0)) == 4  # 3.5


@pytest.mark.parametrize(("rate", "shown"), [(0.0, "0"), (-0.1, "-0.1"), (1.1, "1.1"), (float("nan"), "nan")])
def test_rates_outside_the_bounds(rate: float, shown: str) -> None:
    assert refusal(poison, pictures([0, 1]), PATCH, rate=rate, seed=0, classes=2) == (
        f"`rate` must be more than 0 and at most 1, got {shown}. For a clean model: attack none."
    )


def test_a_rate_that_selects_no_row() -> None:
    data = pictures([0] * 1797)
    assert refusal(poison, data, PATCH, rate=0.0002, seed=0, classes=2) == (
        "`rate=0.0002` of 1,797 examples selects no row. Take at least 0.0006."
    )
    assert len(poison(data, PATCH, rate=0.0006, seed=0, classes=2).rows) == 1


def test_a_clean_label_rate_above_the_share() -> None:
    attack = attacks.SIG(target=1)
    assert refusal(poison, pictures([0] * 2700 + [1] * 300), attack, rate=0.2, seed=0, classes=2) == (
        "`rate=0.2` wants 600 examples, but a clean-label attack takes them from class 1, which has 300. "
        "The largest possible rate is 0.1."
    )
    assert refusal(poison, pictures([0, 0]), attack, rate=1, seed=0, classes=2) == (
        "`rate=1` wants 2 examples, but a clean-label attack takes them from class 1, which has 0. "
        "Choose another `target`."
    )


def test_source_classes_of_which_too_little_stays_clean() -> None:
    data = pictures([0] * 2700 + [1] * 300)
    assert refusal(poison, data, attacks.TaCT(sources=(1,)), rate=0.09, seed=0, classes=2) == (
        "`rate=0.09` takes 270 of the 300 examples of class 1: a victim that sees fewer without the trigger than with "
        "it also moves them without it. The largest possible rate is 0.05."
    )
    assert refusal(poison, pictures([0, 1]), attacks.TaCT(sources=(1,)), rate=0.5, seed=0, classes=2) == (
        "`rate=0.5` takes 1 of the 1 examples of class 1: a victim that sees fewer without the trigger than with it "
        "also moves them without it. Choose another `sources`."
    )
    assert len(poison(data, attacks.TaCT(sources=(1,), cover_ratio=0), rate=0.05, seed=0, classes=2).rows) == 150


def test_a_target_outside_the_classes() -> None:
    assert refusal(poison, pictures([0, 1]), replace(PATCH, target=2), rate=1, seed=0, classes=2) == (
        "BadNets.target must be 0 to 1, got 2."
    )


def test_rules_that_a_trigger_cannot_have() -> None:
    assert refusal(attacks.WaNet, label_rule="clean-label") == (
        "WaNet.label_rule must be one of 'all-to-one' or 'all-to-all', got clean-label."
    )
    assert refusal(attacks.LabelConsistent, label_rule="all-to-one") == (
        "LabelConsistent.label_rule must be one of 'clean-label', got all-to-one."
    )


@value
class Inverted:
    """A trigger of a user's own: the negative; it has two rules, and a cover."""

    target: int = 0
    label_rule: LabelRule = "all-to-one"
    cover_ratio: float = 0.0

    rules = ("all-to-one", "clean-label")

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        return {"white": torch.ones(1)}

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        return arrays["white"] - pixels

    def cover(self, pixels: Tensor, arrays: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        return torch.zeros_like(pixels)


def test_an_attack_of_ones_own_needs_no_registration() -> None:
    assert isinstance(Inverted(), Attack)
    data = pictures([0, 1, 2, 0])
    made = poison(data, Inverted(target=2), rate=0.5, seed=0, classes=3)
    assert torch.equal(made.data.items[made.rows], 255 - data.items[made.rows])
    message = refusal(poison, data, Inverted(label_rule="all-to-all"), rate=1, seed=0, classes=3)
    assert message == "Inverted.label_rule must be all-to-one or clean-label, got all-to-all."


@given(labels=st.lists(st.integers(0, 2), min_size=4, max_size=60), ratio=st.floats(0, 3), seed=st.integers(0, 9))
def test_cover_rows_keep_their_label_and_are_other_rows(labels: list[int], ratio: float, seed: int) -> None:
    data, attack = pictures(labels), Inverted(cover_ratio=ratio)
    count = round(0.25 * len(labels))
    if round(ratio * count) > len(labels) - count:
        message = refusal(poison, data, attack, rate=0.25, seed=seed, classes=3)
        assert message == (
            f"Inverted needs {round(ratio * count)} more rows as cover, but {len(labels) - count} are left. "
            "Lower `rate` or `cover_ratio`."
        )
        return
    made = poison(data, attack, rate=0.25, seed=seed, classes=3)
    poisoned, cover = made.rows.tolist(), made.cover.tolist()
    assert len(cover) == round(ratio * count)
    assert cover == sorted(set(cover))
    assert not set(poisoned) & set(cover)
    assert (made.data.items[made.cover] == 0).all()
    assert made.data.labels.tolist() == [0 if row in poisoned else label for row, label in enumerate(labels)]
    rest = [row for row in range(len(labels)) if row not in poisoned + cover]
    assert torch.equal(made.data.items[rest], data.items[rest])


def test_a_dry_run_checks_and_draws_but_changes_nothing() -> None:
    data = pictures([0, 1, 2, 0])
    dry, real = (poison(data, PATCH, rate=0.5, seed=3, classes=3, dry=dry) for dry in (True, False))
    assert torch.equal(dry.rows, real.rows)
    assert dry.data is data
    assert "BadNets.target" in refusal(poison, data, replace(PATCH, target=9), rate=1, seed=0, classes=3, dry=True)


# Eight bits, and who counts as attacked.


def test_triggers_are_rounded_and_cut_off_at_eight_bits() -> None:
    items = torch.tensor([0, 1, 100, 254, 255], dtype=torch.uint8).view(5, 1, 1, 1)
    made = stamped(items, lambda pixels: pixels * 1.006 + 0.4 / 255, chunk=2)
    # 0.4, 1.406, 101.0, 255.924, 256.93.
    assert made.flatten().tolist() == [0, 1, 101, 255, 255]
    assert stamped(items, lambda pixels: pixels - 2 / 255).flatten().tolist() == [0, 0, 98, 252, 253]
    assert len(stamped(items[:0], lambda pixels: pixels)) == 0


@pytest.mark.parametrize("rule", ["all-to-one", "clean-label"])
def test_only_other_classes_are_attacked(rule: LabelRule) -> None:
    data = pictures([1, 0, 2, 1, 2])
    made = triggered(data, Trigger.of(replace(PATCH, label_rule=rule), data), 3)
    assert made.data.labels.tolist() == [0, 2, 2]
    assert made.wanted.tolist() == [1, 1, 1]
    assert (made.label_rule, made.target) == (rule, 1)
    assert (made.data.items[:, 0, -1, -1] == 255).all()
    assert torch.equal(made.data.items[:, :, :-1], data.items[[1, 2, 4]][:, :, :-1])


def test_all_to_all_attacks_every_class() -> None:
    data = pictures([1, 0, 2])
    made = triggered(data, Trigger.of(replace(PATCH, label_rule="all-to-all"), data), 3)
    assert made.data.labels.tolist() == [1, 0, 2]
    assert made.wanted.tolist() == [2, 1, 0]
    assert made.target is None


def test_data_that_carries_its_trigger_already() -> None:
    data = pictures([1, 0, 2])
    made = already_triggered(data, 2, 3)
    assert torch.equal(made.data.items, data.items[:2])
    assert made.wanted.tolist() == [2, 2]
    assert already_triggered(data, 2, 3, "all-to-all").wanted.tolist() == [2, 1, 0]


# attack.json.

PICTURE = "picture.png"
TRIGGERS = [
    attacks.BadNets(size=2, place="top-left"),
    attacks.BadNets(pattern=PICTURE, label_rule="all-to-all"),
    attacks.Blended(pattern_seed=5, ratio=0.123),
    attacks.Blended(pattern=PICTURE, target=3),
    attacks.SIG(delta=12.5, frequency=3, target=2),
    attacks.LabelConsistent(epsilon=4, size=2),
    attacks.WaNet(strength=1.5, warp_seed=7),
]


@pytest.mark.parametrize("attack", TRIGGERS, ids=repr)
def test_attack_json_rebuilds_the_same_bytes(attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    array = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(array).save(PICTURE)
    data = pictures([0, 1, 2, 3] * 5, side=8, channels=3)
    made = poison(data, attack, rate=0.1, seed=4, classes=4, dry=True)
    save_trigger(tmp_path, describe(made, rate=0.1, seed=4, implanted=None), made.trigger.arrays)
    (tmp_path / PICTURE).unlink()
    for path in (tmp_path, tmp_path / "attack.json", str(tmp_path / "attack.json")):
        loaded = load_trigger(path)
        assert loaded.attack == attack
        assert torch.equal(loaded.stamp(data.items), made.trigger.stamp(data.items))
    assert as_trigger(tmp_path, data).attack == attack
    assert as_trigger(loaded, data) is loaded


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    data = pictures([0, 1, 2, 1, 2, 0, 0, 1], channels=3)
    made = poison(data.select([7, 6, 5, 4, 3, 2]), PATCH, rate=0.5, seed=0, classes=3)
    save_trigger(tmp_path, describe(made, rate=0.5, seed=0, implanted=False), made.trigger.arrays)
    return tmp_path / "attack.json"


def edit(path: Path, **changes: object) -> None:
    """Change entries as somebody who knows how the file's own hash is made."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({**content, "sha256": digest(content)}))


def test_attack_json_says_what_was_done(saved: Path) -> None:
    content = json.loads(saved.read_text())
    stored = (saved.parent / "trigger.safetensors").read_bytes()
    assert content["format"] == 1
    assert content["attack"] == {
        "name": "badnets",
        "parameters": {
            **{"pattern": "solid", "size": 1, "place": "bottom-right", "margin": 0},
            **{"target": 1, "label_rule": "all-to-one"},
        },
    }
    assert content["rows"] == [7 - row for row in draw(PATCH, torch.zeros(6), rate=0.5, seed=0).tolist()]
    assert (content["n"], content["rate"], content["seed"], content["cover_rows"]) == (6, 0.5, 0, [])
    assert (content["target"], content["label_rule"], content["implanted"]) == (1, "all-to-one", False)
    assert content["train_time"] == "as at test time"
    assert content["test_time"] == "the trigger on every image, rounded to 8 bits"
    assert content["trigger"] == {"file": "trigger.safetensors", "sha256": hashlib.sha256(stored).hexdigest()}


def test_a_missing_file(tmp_path: Path) -> None:
    assert refusal(load_trigger, tmp_path / "no.json") == (
        f"{tmp_path}/no.json does not exist; `attack` takes the attack.json that unbackdoor attack wrote."
    )
    assert refusal(load_trigger, tmp_path) == (
        f"{tmp_path}/attack.json does not exist; `attack` takes the attack.json that unbackdoor attack wrote."
    )


def test_another_format(saved: Path) -> None:
    edit(saved, format=2)
    assert (
        refusal(load_trigger, saved)
        == f"{saved} has format 2, this version reads 1. Take the version of unbackdoor that wrote it."
    )


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "1",
        "null",
        "{}",
        "\x00",
        '{"format": 1, "attack": "badnets", "trigger": {}}',
        '{"format": 1, "attack": {"name": "badnets", "parameters": 3}, "trigger": {"file": "f", "sha256": ""}}',
        '{"format": 1, "attack": {"name": "badnets", "parameters": {}}, "trigger": {"file": 3, "sha256": ""}}',
        '{"format": 1, "attack": {"name": "badnets", "parameters": {}}, "trigger": "f"}',
        "[" * 100_000,
    ],
)
def test_files_that_are_no_attack_json(saved: Path, text: str) -> None:
    saved.write_text(text)
    assert refusal(load_trigger, saved) == (
        f"{saved} is not an attack.json that unbackdoor attack wrote. Plant the attack again."
    )


def test_fields_edited_by_hand(saved: Path) -> None:
    edit(saved, attack={"name": "badnets", "parameters": {"size": 0}})
    assert refusal(load_trigger, saved) == "BadNets.size must be at least 1, got 0."
    edit(saved, attack={"name": "badnets", "parameters": {"side": 1}})
    assert refusal(load_trigger, saved).startswith("BadNets has no field 'side'; its fields are pattern,")
    edit(saved, attack={"name": "badnet", "parameters": {}})
    assert refusal(load_trigger, saved) == (
        "There is no attack 'badnet'. Did you mean 'badnets'? See unbackdoor list attacks."
    )


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "badnets", "parameters": {"size": 3, "target": 1}},  # the patch is 1x1
        {"name": "blended", "parameters": {"target": 1}},  # the pattern is missing
    ],
)
def test_fields_that_do_not_fit_the_arrays(saved: Path, spec: dict) -> None:
    edit(saved, attack=spec)
    data = pictures([0, 1, 2])
    owner = "BadNets" if spec["name"] == "badnets" else "Blended"
    assert refusal(triggered, data, load_trigger(saved), 3) == (
        f"The trigger of {owner} does not fit the images of d.parquet, which are 1x4x4. Score on images of the shape "
        "that the attack was made for."
    )


@pytest.mark.parametrize(
    "change",
    [
        {"target": 2},
        {"label_rule": "all-to-all"},
        {"rows": [0]},
        {"implanted": True},
        {"attack": {"name": "badnets", "parameters": {"size": 1, "target": 2}}},
        {"sha256": "0"},
        {"sha256": 3},
        {"sha256": None},
        {"more": 1},
    ],
)
def test_a_file_changed_by_hand(saved: Path, change: dict) -> None:
    content = json.loads(saved.read_text())
    saved.write_text(json.dumps(dict(reversed(content.items()))))  # in another order and layout it is the same
    assert load_trigger(saved).attack == PATCH
    saved.write_text(json.dumps({**content, **change}))
    assert refusal(load_trigger, saved) == (
        f"{saved} was changed after unbackdoor attack wrote it. Take the original, or plant the attack again."
    )


def test_data_of_the_target_alone_is_refused() -> None:
    assert refusal(poison, pictures([1, 1, 1]), attacks.SIBA(target=1), rate=0.5, seed=0, classes=3) == (
        "SIBA.target is 1, the class of all examples of d.parquet, so there is none to move there. Give examples of "
        "other classes as well."
    )


def test_label_rule_and_target_that_contradict_the_attack(saved: Path) -> None:
    for change in ({"target": 2}, {"label_rule": "all-to-all"}):
        original = saved.read_text()
        edit(saved, **change)
        assert refusal(load_trigger, saved) == (
            f"{saved} was changed after unbackdoor attack wrote it. Take the original, or plant the attack again."
        )
        saved.write_text(original)


def test_arrays_missing_or_replaced(saved: Path) -> None:
    arrays = saved.parent / "trigger.safetensors"
    arrays.write_bytes(arrays.read_bytes() + b"\x00")
    assert refusal(load_trigger, saved) == (
        f"{arrays} is not the file that attack.json was written with. Copy both again."
    )
    arrays.write_bytes(b"\xff" * 40)
    edit(saved, trigger={"file": arrays.name, "sha256": hashlib.sha256(arrays.read_bytes()).hexdigest()})
    assert refusal(load_trigger, saved).startswith(f"{arrays} is not a safetensors file (")
    arrays.unlink()
    assert (
        refusal(load_trigger, saved)
        == f"{saved} needs trigger.safetensors in the same directory, but it is missing. Copy both."
    )


def test_the_control_has_no_trigger(saved: Path) -> None:
    edit(saved, attack={"name": "none", "parameters": {}})
    assert refusal(load_trigger, saved) == (
        f"{saved} belongs to a clean control, which has no trigger. Give a victim's attack.json."
    )


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "antigravity:Anything", "json:nothing"])
def test_attack_json_cannot_run_code(saved: Path, name: str) -> None:
    proof = saved.parent / "ran"
    edit(saved, attack={"name": name, "parameters": {"command": f"touch {proof}", "args": ["touch", str(proof)]}})
    assert refusal(load_trigger, saved) == (
        f"{saved} names the attack {name}, which is not one of unbackdoor's own and is not imported here. Score it in "
        "Python, after importing its class."
    )
    assert not proof.exists()


def test_an_imported_attack_of_ones_own_is_rebuilt(tmp_path: Path) -> None:
    data = pictures([0, 1, 2])
    made = poison(data, Inverted(), rate=1, seed=0, classes=3)
    save_trigger(tmp_path, describe(made, rate=1, seed=0, implanted=True), made.trigger.arrays)
    loaded = load_trigger(tmp_path)
    assert loaded.attack == Inverted()
    assert torch.equal(loaded.stamp(data.items), 255 - data.items)


@pytest.mark.parametrize("attack", [attacks.Blended(), attacks.SIG(), attacks.WaNet(), attacks.LabelConsistent(size=2)])
def test_images_of_another_shape(attack) -> None:
    trigger = Trigger.of(attack, pictures([0, 1], side=8, channels=3))
    for other in (pictures([0, 1], side=9, channels=3), pictures([0, 1], side=8, channels=1)):
        if isinstance(attack, attacks.WaNet) and other.shape == (1, 8, 8):
            continue  # a warp has no channels
        assert refusal(triggered, other, trigger, 2) == (
            f"The trigger of {type(attack).__name__} does not fit the images of d.parquet, which are "
            f"{'x'.join(map(str, other.shape))}. Score on images of the shape that the attack was made for."
        )


def test_a_patch_larger_than_the_image(small_cnn, digits: Dataset) -> None:
    expected = "BadNets.size plus margin must be at most 8, the side of the images, got 8 + 1."
    attack = attacks.BadNets(size=8)
    assert refusal(poison, digits, attack, rate=0.1, seed=0, classes=10) == expected
    assert refusal(evaluate, small_cnn, digits, attack=attack) == expected
    big = Trigger.of(attack, pictures([0], side=9))
    assert "does not fit the images of digits, which are 1x8x8" in refusal(evaluate, small_cnn, digits, attack=big)
