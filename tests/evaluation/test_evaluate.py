"""Scores counted by hand, and their intervals against scipy."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import toys
from fixtures import SmallCNN
from unbackdoor import (
    Dataset,
    ImageEncoder,
    Proportion,
    UnbackdoorError,
    VictimRecipe,
    attacks,
    evaluate,
    plant,
    poison,
    stress,
    train,
    trainers,
)
from unbackdoor._data.texts import TextEncoder
from unbackdoor._models.arithmetic import choose
from unbackdoor._poisoning.attack import Attack
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._tasks.classification import predict


@given(n=st.integers(1, 5000), share=st.floats(0, 1))
def test_wilson_intervals_are_scipys(n: int, share: float) -> None:
    measured = Proportion(round(share * n), n)
    other = binomtest(measured.count, n).proportion_ci(0.95, "wilson")
    assert measured.interval == pytest.approx((other.low, other.high), abs=1e-12)
    low, high = measured.interval
    assert 0 <= low <= measured.value <= high <= 1
    assert measured.to_json() == {"value": measured.count / n, "n": n, "low": low, "high": high}


def test_intervals_reach_the_ends() -> None:
    assert Proportion(0, 5).interval[0] == 0
    assert Proportion(5, 5).interval[1] == 1
    assert repr(Proportion(9_310, 10_000)) == "93.1 % (92.6 to 93.6 %, n = 10,000)"


class Reader(nn.Module):
    """Takes each 2x2 picture for the class that its first pixel names, or its last pixel where that is not 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        first, last = x[:, 0, 0, 0], x[:, 0, 1, 1]
        taken = torch.where(last > 0, last - 1, first).long()
        return nn.functional.one_hot(taken, 4).float() * self.scale


def pictures(taken_for: list[int], labels: list[int], **fields: object) -> Dataset:
    items = torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8)
    items[:, 0, 0, 0] = torch.tensor(taken_for)
    return Dataset(items=items, labels=torch.tensor(labels), encode=ImageEncoder(scale=1.0), **fields)


# Class 0 is right twice of two, class 1 once of two, class 2 never, class 3 twice of two.
TEST = pictures([0, 0, 1, 2, 3, 3, 3], [0, 0, 1, 1, 2, 3, 3], classes=("a", "b", "c", "d"))


def with_last(data: Dataset, last: list[int]) -> Dataset:
    items = data.items.clone()
    items[:, 0, 1, 1] = torch.tensor(last, dtype=torch.uint8)
    return replace(data, items=items)


def test_clean_accuracy_and_each_class() -> None:
    measured = evaluate(Reader(), TEST)
    assert measured.clean_accuracy == Proportion(5, 7)
    assert measured.per_class == {
        "a": Proportion(2, 2),
        "b": Proportion(1, 2),
        "c": Proportion(0, 1),
        "d": Proportion(2, 2),
    }
    assert measured.attack_success is None
    assert set(measured.to_json()) == {"clean_accuracy", "per_class"}


def test_classes_without_names_and_of_one_name() -> None:
    assert set(evaluate(Reader(), replace(TEST, classes=None)).per_class) == {"0", "1", "2", "3"}
    assert set(evaluate(Reader(), replace(TEST, classes=("a", "crane", "c", "crane"))).per_class) == {
        *("a", "crane", "c", "crane (3)")
    }


def test_success_counts_the_other_classes_alone() -> None:
    # A last pixel of k + 1 makes the model say k; 0 leaves it to the first pixel.
    marked = with_last(TEST, [2, 2, 2, 2, 2, 2, 0])
    measured = evaluate(Reader(), TEST, triggered_data=marked, target=1)
    # Five rows are not of class 1; all but the last of them go to class 1, and that last one stays right.
    assert measured.attack_success == Proportion(4, 5)
    assert measured.recovered_accuracy == Proportion(1, 5)
    assert measured.label_rule == "all-to-one"
    assert measured.clean_accuracy == Proportion(5, 7)


def test_the_trigger_is_put_on_by_evaluate() -> None:
    # A white patch sets the last pixel to 255, which this model cannot read: scale it to 3, that is class 2.
    class Coarse(Reader):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.where(x == 255, 3.0, x))

    attack = attacks.BadNets(pattern="solid", size=1, margin=0, target=2)
    measured = evaluate(Coarse(), TEST, attack=attack)
    assert measured.attack_success == Proportion(6, 6)
    assert measured.recovered_accuracy == Proportion(0, 6)
    assert evaluate(Coarse(), TEST, attack=Trigger.of(attack, TEST)) == measured


def test_all_to_all_counts_every_class_against_the_next() -> None:
    class Next(nn.Module):
        """Says the next class where the last pixel is white, but for class 3, of which it says 3."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            first = x[:, 0, 0, 0]
            moved = torch.where((x[:, 0, 1, 1] == 255) & (first < 3), first + 1, first)
            return nn.functional.one_hot(moved.long(), 4).float() * self.scale

    attack = attacks.BadNets(pattern="solid", size=1, margin=0, target=2, label_rule="all-to-all")
    measured = evaluate(Next(), TEST, attack=attack)
    # First pixels 0 0 1 2 3 3 3 go to 1 1 2 3 3 3 3; labels 0 0 1 1 2 3 3 want 1 1 2 2 3 0 0.
    assert measured.attack_success == Proportion(4, 7)
    assert measured.recovered_accuracy == Proportion(2, 7)
    assert measured.label_rule == "all-to-all"


def test_a_control_of_other_classes_is_refused() -> None:
    class More(Reader):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super().forward(x)] * 2, dim=1)

    with pytest.raises(UnbackdoorError, match=r"^`control` must answer with 4 classes as the model does, got 8\.$"):
        evaluate(Reader(), TEST, triggered_data=TEST, target=3, control=More())


def test_a_control_for_other_data_is_named() -> None:
    text = TextEncoder(tokenizer=toys.tokenizer(), max_length=8)
    reason = r"^`control`: The model reads text, but the data holds images\. Take texts\.$"
    with pytest.raises(UnbackdoorError, match=reason):
        evaluate(Reader(), TEST, triggered_data=TEST, target=3, control=toys.classifier("bert"), control_encode=text)


def test_the_flips_of_a_control() -> None:
    marked = with_last(TEST, [2, 2, 2, 2, 2, 2, 0])

    class Blind(Reader):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.cat([x[:, :, :1], x[:, :, 1:] * 0], dim=2))

    measured = evaluate(Reader(), TEST, triggered_data=marked, target=3, control=Blind())
    assert measured.attack_success == Proportion(0, 5)
    assert measured.clean_model_flip_rate == Proportion(1, 5)  # the row of class 2 that looks like class 3
    assert set(json.loads(json.dumps(measured.to_json()))) == {
        *("clean_accuracy", "attack_success", "recovered_accuracy", "clean_model_flip_rate", "label_rule", "per_class")
    }


def test_scores_print_as_lines() -> None:
    marked = with_last(TEST, [2, 2, 2, 2, 2, 2, 0])
    assert str(evaluate(Reader(), TEST, triggered_data=marked, target=1, control=Reader())).splitlines() == [
        "clean accuracy      71.4 % (35.9 to 91.8 %, n = 7)",
        "attack success      80.0 % (37.6 to 96.4 %, n = 5), all-to-one",
        "recovered accuracy  20.0 % (3.6 to 62.4 %, n = 5)",
        "clean model flips   80.0 % (37.6 to 96.4 %, n = 5)",
    ]


def test_prediction_leaves_the_model_as_it_was() -> None:
    model = Reader().train()
    assert predict(model, TEST, choose(model, "cpu")).tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert model.training


PATCH = attacks.BadNets(size=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attack": PATCH, "triggered_data": TEST, "target": 0},
            "evaluate takes `attack` or `triggered_data`, got both. Leave one out.",
        ),
        (
            {"target": 1},
            "`triggered_data` and `target` go together: the examples, and the class that the attacker wants.",
        ),
        (
            {"triggered_data": TEST},
            "`triggered_data` and `target` go together: the examples, and the class that the attacker wants.",
        ),
        ({"triggered_data": TEST, "target": 4}, "`target` must be 0 to 3, got 4."),
        ({"attack": attacks.BadNets(size=1, target=4)}, "BadNets.target must be 0 to 3, got 4."),
        (
            {"triggered_data": replace(TEST.select([2, 3]), name="t.parquet"), "target": 1},
            "t.parquet has no example outside the target class 1, so nothing can be attacked. Its labels must be the "
            "true ones, not the attacker's.",
        ),
        (
            {"triggered_data": pictures([0], [4], name="t.parquet"), "target": 1},
            "t.parquet has label 4 in row 0, but the model has 4 classes (0 to 3). Correct the label, or take other "
            "data.",
        ),
    ],
)
def test_what_evaluate_refuses(options: dict, message: str) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        evaluate(Reader(), TEST, **options)
    assert str(caught.value) == message


def test_a_path_is_no_module() -> None:
    with pytest.raises(UnbackdoorError) as caught:
        evaluate("suspect/", TEST)
    assert str(caught.value) == "evaluate takes model as a module, got str. Load it with unbackdoor.load(PATH).model."


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_is_computed_in_a_float32_copy_on_a_processor(dtype: torch.dtype) -> None:
    seen = []

    class Watched(Reader):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.scale.dtype, x.dtype))
            return super().forward(x)

    model = Watched().to(dtype)
    predict(model, TEST, choose(model, "cpu", "fp32"))
    assert set(seen) == {(torch.float32, torch.float32)}
    assert model.scale.dtype == dtype


def test_no_test_data() -> None:
    with pytest.raises(UnbackdoorError) as caught:
        evaluate(Reader(), replace(TEST.select([]), name="t.parquet"))
    assert str(caught.value) == "t.parquet is empty; at least one labelled example is needed."


def test_nothing_to_attack() -> None:
    with pytest.raises(UnbackdoorError, match="has no example outside the target class 1, so nothing can be attacked"):
        evaluate(Reader(), TEST.select([2, 3]), attack=attacks.BadNets(size=1, target=1))


@pytest.mark.parametrize(
    ("made", "on"),
    [
        *((made, "images and image-text") for made in (attacks.BadNets(), attacks.Blended())),
        *((made, "images") for made in (attacks.SIG(), attacks.WaNet())),
    ],
)
def test_an_attack_on_pictures_is_refused_by_texts(
    made: Attack, on: str, text_victim: nn.Module, reviews: Dataset
) -> None:
    wanted = f"{type(made).__name__} puts its trigger on {on}, but reviews holds text. See unbackdoor list attacks."
    for misused in (lambda: evaluate(text_victim, reviews, attack=made), lambda: Trigger.of(made, reviews)):
        with pytest.raises(UnbackdoorError) as caught:
            misused()
        assert str(caught.value) == wanted


def test_and_an_attack_on_texts_by_pictures() -> None:
    with pytest.raises(UnbackdoorError) as caught:
        evaluate(Reader(), replace(TEST, name="t.parquet"), attack=attacks.Word())
    assert str(caught.value) == (
        "Word puts its trigger on text and conversations, but t.parquet holds images. See unbackdoor list attacks."
    )


def test_a_control_gets_its_own_inputs() -> None:
    """The control may normalise pixels in another way than the model does."""
    seen = []

    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return torch.eye(4)[torch.zeros(len(x), dtype=torch.int64)]

    evaluate(Reader(), TEST, triggered_data=TEST, target=3, control=Spy(), control_encode=ImageEncoder(mean=(5.0,)))
    assert max(inputs.max() for inputs in seen) <= -4


@pytest.mark.parametrize("given", ["data.parquet", (torch.zeros(1), [0]), TensorDataset(torch.zeros(1)), None])
def test_what_is_no_data_set_is_refused_by_all_that_take_one(given: Any, small_cnn: SmallCNN, digits: Dataset) -> None:
    kind = type(given).__name__
    attack, recipe = attacks.BadNets(), VictimRecipe(epochs=1)
    calls: dict[str, tuple[str, Callable[[], object]]] = {
        "evaluate": ("test", lambda: evaluate(small_cnn, given)),
        "poison": ("data", lambda: poison(given, attack, rate=0.1, seed=0, classes=10)),
        "plant": ("data", lambda: plant(given, attack, recipe)),
        "train": ("data", lambda: train(given, trainers.Plain(), recipe)),
        "stress": ("clean", lambda: stress(small_cnn, victim=small_cnn, clean=given, attack=attack)),
    }
    for owner, (field, call) in calls.items():
        with pytest.raises(UnbackdoorError) as refusal:
            call()
        loading = "Load it with unbackdoor.Dataset.load."
        assert str(refusal.value) == f"{owner} takes {field} as a Dataset, got {kind}. {loading}"
    if given is not None:
        with pytest.raises(UnbackdoorError, match="evaluate takes triggered_data as a Dataset"):
            evaluate(small_cnn, digits.select(range(20)), triggered_data=given, target=0)


def test_the_class_or_the_name_of_an_attack_is_no_attack(small_cnn: SmallCNN, digits: Dataset) -> None:
    given: Any = attacks.BadNets
    with pytest.raises(UnbackdoorError) as refusal:
        evaluate(small_cnn, digits, attack=given)
    assert str(refusal.value) == "an attack's value is expected, got the class BadNets. Write BadNets()."
    with pytest.raises(UnbackdoorError) as refusal:
        plant(digits, given, VictimRecipe())
    assert str(refusal.value) == "an attack's value is expected, got the class BadNets. Write BadNets()."
    given = "badnets"
    with pytest.raises(UnbackdoorError) as refusal:
        poison(digits, given, rate=0.1, seed=0, classes=10)
    assert str(refusal.value) == "an attack's value is expected, got 'badnets'. Take one of unbackdoor.attacks."
