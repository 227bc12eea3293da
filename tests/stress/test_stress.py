"""Stress tests: what they are made of, against counts by hand and plain second implementations."""

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fixtures import SmallCNN
from unbackdoor import Dataset, ImageEncoder, UnbackdoorError, attacks, purifiers, purify, stress
from unbackdoor._data.augmentation import Augmentation
from unbackdoor._data.texts import TextEncoder, Texts
from unbackdoor._evaluation.evaluate import evaluate
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.calling import logits
from unbackdoor._poisoning.poison import poison
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._poisoning.triggered import triggered
from unbackdoor._reports import build_stress, render_stress
from unbackdoor._stress.path import between, recompute_batch_norm_
from unbackdoor._stress.reactivation import Perturbation, learn, perturbed
from unbackdoor._stress.retuning import exactly_purified, retune, retuning_set
from unbackdoor._value import value

PATCH = attacks.BadNets(size=2, margin=0, target=3)
FAST = {"seed": 1, "device": "cpu", "precision": "fp32"}


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module", autouse=True)
def short_reactivation() -> Iterator[None]:
    """Fewer epochs of the perturbation than users get."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unbackdoor._stress.stress.REACTIVATION_EPOCHS", 2)
        yield


@pytest.fixture(scope="module")
def parts(digits: Dataset) -> dict[str, object]:
    """A victim, a purified model and a control on real digits, in about a second."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = SmallCNN().eval()
    clean, rest = digits.split(200, seed=0)
    test, train = rest.split(300, seed=0)
    train = train.select(range(700))
    tuning = purifiers.FineTuning(epochs=4, learning_rate=0.1, batch_size=32)
    poisoned = poison(train, PATCH, rate=0.1, seed=0, classes=10)
    victim = purify(fresh, poisoned.data, tuning, **FAST).model
    return {
        "victim": victim,
        "model": purify(victim, clean, purifiers.FST(epochs=4, batch_size=32), **FAST).model,
        "control": purify(fresh, train, tuning, **FAST).model,
        "clean": clean,
        "test": test,
        "attack": PATCH,
    }


@pytest.fixture
def given(parts: dict[str, object]) -> dict[str, object]:
    return {**parts, **FAST}


def run(given: dict[str, object], **changes: object):
    given = {**given, **changes}
    return stress(given.pop("model"), **given)


class TestRetuning:
    def bait(self, data: Dataset, attack=PATCH):
        numbered = replace(data, rows=torch.arange(len(data)))
        return triggered(numbered, Trigger.of(attack, data), 10)

    @pytest.mark.parametrize("count", [1, 5, 20])
    def test_batches_hold_exactly_k_triggered_rows(self, digits: Dataset, count: int) -> None:
        clean = replace(digits.select(range(200)), augment=Augmentation(padding=1, flip=False))
        made = retuning_set(clean, self.bait(clean), count, seed=4)
        stamped = Trigger.of(PATCH, clean).stamp(clean.items)
        with_trigger = {image.numpy().tobytes(): int(label) for image, label in zip(stamped, clean.labels, strict=True)}
        assert len(made) == len(clean)
        for _ in range(2):  # epochs
            found = [
                (made.items[row].numpy().tobytes(), int(label))
                for batch in made.batches(16, generator=torch.Generator().manual_seed(0))
                for row, label in zip(batch.rows, batch.labels, strict=True)
            ]
            hits = [(with_trigger[image], label) for image, label in found if image in with_trigger]
            assert len(hits) == count
            assert all(true != 3 and label == 3 for true, label in hits)

    def test_the_rest_is_the_clean_examples_with_their_labels(self, digits: Dataset) -> None:
        clean = digits.select(range(60))
        made = retuning_set(clean, self.bait(clean), 5, seed=0)
        own = {image.numpy().tobytes(): int(label) for image, label in zip(clean.items, clean.labels, strict=True)}
        kept = [(image.numpy().tobytes(), int(label)) for image, label in zip(made.items, made.labels, strict=True)]
        assert sum(own.get(image) == label for image, label in kept) == 55

    def test_small_counts_are_part_of_large_ones(self, digits: Dataset) -> None:
        clean = digits.select(range(100))
        bait = self.bait(clean)
        few, many = (retuning_set(clean, bait, count, seed=2).items[-count:] for count in (2, 10))
        assert torch.equal(few, many[:2])
        assert not torch.equal(few, retuning_set(clean, bait, 2, seed=3).items[-2:])

    def test_all_to_all_gives_each_example_its_next_class(self, digits: Dataset) -> None:
        clean = digits.select(range(100))
        attack = replace(PATCH, label_rule="all-to-all")
        bait = self.bait(clean, attack)
        made = retuning_set(clean, bait, 100, seed=0)
        stamped = Trigger.of(attack, clean).stamp(clean.items)
        true = {image.numpy().tobytes(): int(label) for image, label in zip(stamped, clean.labels, strict=True)}
        for image, label in zip(made.items, made.labels, strict=True):
            assert int(label) == (true[image.numpy().tobytes()] + 1) % 10

    def test_the_weights_are_those_of_sgd_written_out(self, small_cnn: SmallCNN, digits: Dataset) -> None:
        """v <- 0.9 v + g, w <- w - 0.01 v at a constant rate, 5 epochs of batches of 128 in train mode."""
        data, model = digits.select(range(300)), small_cnn.double()
        arithmetic = choose(model, "cpu", "fp32")
        ours = retune(model, data, seed=6, arithmetic=arithmetic)
        other = copy.deepcopy(model).train()
        generator = torch.Generator().manual_seed(6)
        velocity = [torch.zeros_like(each) for each in other.parameters()]
        for _ in range(5):
            for rows in torch.randperm(300, generator=generator).split(128):
                x = data.encode(data.items[rows]).double()
                loss = nn.functional.cross_entropy(other(x), data.labels[rows])
                gradients = torch.autograd.grad(loss, list(other.parameters()))
                with torch.no_grad():
                    for each, gradient, speed in zip(other.parameters(), gradients, velocity, strict=True):
                        speed.mul_(0.9).add_(gradient)
                        each.sub_(0.01 * speed)
        for name, tensor in other.state_dict().items():
            assert torch.allclose(ours.state_dict()[name], tensor, rtol=1e-9), name

    def test_exact_purification_sees_true_labels(self, parts: dict, digits: Dataset) -> None:
        """The oracle's model forgets the trigger and learns what is under it."""
        victim, clean, test = parts["victim"], parts["clean"], parts["test"]
        both = clean.joined(self.bait(clean).data)
        assert len(both) == len(clean) + int((clean.labels != 3).sum())
        assert torch.equal(both.labels[: len(clean)], clean.labels)
        assert torch.equal(both.labels[len(clean) :], clean.labels[clean.labels != 3])
        made = exactly_purified(victim, clean, self.bait(clean), seed=0, arithmetic=choose(victim, "cpu", "fp32"))
        before, after = (evaluate(each, test, attack=PATCH, device="cpu") for each in (victim, made))
        assert before.attack_success.value > 0.9
        assert after.attack_success.value < 0.3
        assert after.recovered_accuracy.value > 0.6


class TestPath:
    def test_both_ends_are_the_models_themselves(self, parts: dict) -> None:
        victim, purified = parts["victim"], parts["model"]
        assert same(states(between(victim, purified, 0.0)), states(victim))
        assert same(states(between(victim, purified, 1.0)), states(purified))

    def test_between_is_the_weighted_mean(self, parts: dict) -> None:
        victim, purified = states(parts["victim"]), states(parts["model"])
        for name, tensor in between(parts["victim"], parts["model"], 0.3).state_dict().items():
            if tensor.is_floating_point():
                assert torch.allclose(tensor, 0.7 * victim[name] + 0.3 * purified[name], atol=1e-6), name

    def test_batch_norm_against_plain_means(self, small_cnn: SmallCNN, digits: Dataset) -> None:
        """Layer by layer by hand: means and unbiased variances of each batch, weighted by its size."""
        data = digits.select(range(300))
        model = small_cnn.double()
        recompute_batch_norm_(model, data, choose(model, "cpu", "fp32"), seed=2)
        first, second = model.features[1], model.features[5]
        batches = torch.randperm(300, generator=torch.Generator().manual_seed(2)).split(128)
        sums: dict[int, list] = {1: [0, 0], 5: [0, 0]}
        for rows in batches:
            x = (data.items[rows].double() / 255 - 0.3) / 0.37
            for place, convolution, norm in ((1, model.features[0], first), (5, model.features[4], second)):
                x = nn.functional.conv2d(x, convolution.weight, convolution.bias, padding=1)
                mean, variance = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=True)
                sums[place][0] += len(rows) / 300 * mean
                sums[place][1] += len(rows) / 300 * variance
                biased = x.var(dim=(0, 2, 3), unbiased=False)
                x = (x - mean[:, None, None]) / torch.sqrt(biased + norm.eps)[:, None, None]
                x = nn.functional.relu(x * norm.weight[:, None, None] + norm.bias[:, None, None])
                x = nn.functional.max_pool2d(x, 2) if place == 1 else x
        for place, norm in ((1, first), (5, second)):
            assert torch.allclose(norm.running_mean, sums[place][0], atol=1e-6)
            assert torch.allclose(norm.running_var, sums[place][1], atol=1e-6)
            assert norm.momentum == 0.1
            assert not norm.training

    def test_only_statistics_change_and_augmentation_is_off(self, small_cnn: SmallCNN, digits: Dataset) -> None:
        data = digits.select(range(200))
        shaken = replace(data, augment=Augmentation(padding=2, flip=True))
        plain, other = copy.deepcopy(small_cnn), copy.deepcopy(small_cnn)
        recompute_batch_norm_(plain, data, choose(plain, "cpu", "fp32"), seed=0)
        recompute_batch_norm_(other, shaken, choose(other, "cpu", "fp32"), seed=0)
        assert same(states(plain), states(other))
        changed = {name for name, tensor in states(plain).items() if not torch.equal(tensor, states(small_cnn)[name])}
        assert {name.rpartition(".")[2] for name in changed} == {"running_mean", "running_var", "num_batches_tracked"}


class TestReactivation:
    def test_the_perturbation_keeps_its_bound(self, digits: Dataset) -> None:
        made = Perturbation(digits.encode, digits.shape)
        with torch.no_grad():
            for layer in list(made.layers.children())[::2]:
                layer.weight.mul_(50)
        shown = perturbed(digits, made)
        difference = (shown.pixels.int() - digits.pixels.int()).abs()
        assert shown.pixels.dtype == torch.uint8
        assert int(difference.max()) == 16

    def test_a_larger_model_input_and_a_gradient_through_resizing(self, digits: Dataset) -> None:
        class Mean(nn.Module):
            """Class scores that follow the brightness of 16x16 pictures; the trigger has nothing to do with them."""

            def __init__(self, slope: float) -> None:
                super().__init__()
                self.slope = nn.Parameter(torch.tensor(slope))

            def forward(self, x: Tensor) -> Tensor:
                assert x.shape[-2:] == (16, 16)
                bright = self.slope * x.mean(dim=(1, 2, 3))
                return torch.stack([bright, -bright], dim=1)

        data = replace(
            digits.select(range(64)),
            encode=ImageEncoder(mean=(0.3,), std=(0.3,), size=(16, 16), channels=1),
            labels=torch.zeros(64, dtype=torch.int64),
        )
        student, teacher = Mean(1.0), Mean(30.0)  # the teacher is sure where the student is not
        options = {"control_encode": None, "alpha": 1.0, "seed": 0, "advance": lambda: None, "epochs": 15}
        made = learn(student, teacher, data, control=None, arithmetic=choose(student, "cpu", "fp32"), **options)

        def distance(shown: Dataset) -> float:
            with torch.no_grad():
                target = teacher(data.encode(data.items)).softmax(1)
                found = student(shown.encode(shown.items)).log_softmax(1)
                return float(nn.functional.kl_div(found, target, reduction="batchmean"))

        assert distance(perturbed(data, made)) < distance(data)
        assert student.slope.requires_grad
        assert student.slope.grad is None

    def test_it_repeats_and_leaves_the_global_random_state(self, parts: dict) -> None:
        data = parts["clean"].select(range(40))
        options: dict[str, Any] = {"control_encode": None, "alpha": 0.2, "advance": lambda: None, "epochs": 2}
        state = torch.get_rng_state()
        one, two, other = (
            learn(
                copy.deepcopy(parts["model"]),
                copy.deepcopy(parts["victim"]),
                data,
                control=copy.deepcopy(parts["control"]),
                arithmetic=choose(parts["model"], "cpu", "fp32"),
                seed=seed,
                **options,
            )
            for seed in (0, 0, 1)
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert same(states(one), states(two))
        assert not same(states(one), states(other))


def without_time(found) -> dict:
    content = found.to_json()
    content.pop("seconds")
    return content


@pytest.fixture(scope="module")
def found(parts: dict):
    """Everything at once, on two seeds."""
    return run({**parts, **FAST}, counts=(1, 5), seeds=2)


class TestAsAWhole:
    def test_what_is_measured(self, found, parts: dict) -> None:
        content = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert list(content["before"]) == ["victim", "purified", "exact_oracle", "control"]
        assert content["before"]["victim"]["attack_success"]["value"] > 0.9
        for name in ("purified", "exact_oracle", "control"):
            runs = content["retuning"][name]["runs"]
            assert [(each["k"], each["seed"]) for each in runs] == [(1, 1), (1, 2), (5, 1), (5, 2)]
            assert set(runs[0]["attack_success"]) == {"value", "n", "low", "high"}
        assert "victim" not in content["retuning"]
        assert [point["t"] for point in content["path"]["purified"]["points"]] == [place / 10 for place in range(11)]
        ends = content["path"]["purified"]["points"]
        for end, name in ((ends[0], "victim"), (ends[-1], "purified")):
            assert end["attack_success"] == content["before"][name]["attack_success"]
        assert set(content["path_ends_recomputed"]) == {"victim", "purified"}
        assert set(content["reactivation"]["models"]) == {"purified", "control"}
        assert content["reactivation"]["teacher"]["k"] == 5
        assert content["scored_on"]["n"] == 300
        own = evaluate(parts["model"], parts["test"], attack=PATCH, device="cpu", precision="fp32")
        assert content["before"]["purified"]["attack_success"] == own.attack_success.to_json()
        assert content["reactivation"]["models"]["purified"]["triggered"] == own.attack_success.to_json()

    def test_the_oracle_is_marked_everywhere(self, found) -> None:
        content = found.to_json()
        for place in (content["before"], content["retuning"], content["path"], content["settings"]):
            assert place["exact_oracle"]["oracle"] is True
            assert "oracle" not in place.get("purified", {})
        lines = [line for line in str(found).splitlines() if "exact purification" in line]
        assert lines
        assert all("(oracle)" in line for line in lines)
        assert any("only an oracle" in note for note in found.record["notes"])

    def test_the_models_are_left_as_they_were(self, parts: dict, found) -> None:
        for name in ("model", "victim", "control"):
            assert not parts[name].training
            assert all(each.grad is None for each in parts[name].parameters())
        assert same(states(parts["model"]), states(purify_again(parts)))

    def test_the_page(self, found) -> None:
        reported = {"model": "<b>purified</b>", "victim": '"><script>alert(1)</script>', "control": "c"}
        html = render_stress(build_stress(found, reported, ("<i>zero</i>", "a", "b", "<i>three</i>")))
        assert "<script" not in html
        assert "<b>purified" not in html
        assert "&lt;i&gt;three&lt;/i&gt;" in html
        assert "://" not in html
        assert html.count("<svg") == html.count("</svg>") == 4 + 3  # charts and the legend
        assert "prefers-color-scheme: dark" in html
        assert "over 2 seeds" in html
        assert html.count("exact purification") == html.count("exact purification (oracle)")


def purify_again(parts: dict) -> nn.Module:
    return purify(parts["victim"], parts["clean"], purifiers.FST(epochs=4, batch_size=32), **FAST).model


def test_a_seed_repeats(given: dict) -> None:
    options = {"counts": (2,), "parts": ("retune", "path")}
    one, two = (run(given, **options) for _ in range(2))
    assert without_time(one) == without_time(two)
    assert without_time(run(given, **options, seed=5))["retuning"] != without_time(one)["retuning"]


def test_without_test_data_a_seeded_half_is_kept(given: dict) -> None:
    found = run(given, test=None, parts=("retune",), counts=(2,))
    assert found.record["clean"]["n"] == found.record["scored_on"]["n"] == 100
    assert found.record["scored_on"]["note"] == "a seeded half of digits, which nothing was tuned on"
    _, half = given["clean"].split(100, seed=1)
    assert found.before["purified"] == evaluate(given["model"], half, attack=PATCH, device="cpu", precision="fp32")


def test_without_a_control_it_says_what_that_means(given: dict) -> None:
    found = run(given, control=None, parts=("retune", "reactivation"), counts=(1,))
    assert set(found.retuned) == {"purified"}
    assert set(found.reactivated.models) == {"purified"}
    (note,) = found.record["notes"]
    assert note.startswith("No control: the speed at which a model that was never poisoned would learn")
    assert "only its first half" in note
    page = build_stress(found, {"model": "m", "victim": "v", "control": None}, None)
    assert page.verdict.endswith("how fast a clean model would learn that is not known.")


def test_a_control_gets_its_own_inputs(given: dict) -> None:
    """A control behind another normalisation scores as it does alone."""
    encode = ImageEncoder(mean=(0.3 * 255,), std=(0.37 * 255,), scale=1.0, channels=1)
    one = run(given, parts=("retune", "reactivation"), counts=(1,))
    two = run(given, parts=("retune", "reactivation"), counts=(1,), control_encode=encode)
    assert one.before["control"] == two.before["control"]
    after = [found.after("control", 1)[0].clean_accuracy.value for found in (one, two)]
    assert after[0] == pytest.approx(after[1], abs=0.02)


def test_only_some_parts(given: dict) -> None:
    found = run(given, parts=("path",))
    assert not found.retuned
    assert found.reactivated is None
    assert set(found.paths) == {"purified"}
    assert "exact" not in str(found)
    html = render_stress(build_stress(found, {"model": "m", "victim": "v", "control": "c"}, None))
    assert html.count("<figure") == 2


def test_half_precision_and_another_memory_layout(given: dict) -> None:
    halves = {name: copy.deepcopy(given[name]).half() for name in ("model", "victim", "control")}
    found = run(given, **halves, parts=("path", "retune"), counts=(1,), precision="auto")
    assert next(halves["model"].parameters()).dtype == torch.float16
    assert found.before["victim"].attack_success.value > 0.9


class TestWarnings:
    def test_nothing_was_purified(self, given: dict) -> None:
        found = run(given, model=given["victim"], parts=("path",))
        assert found.record["warnings"] == ["`model` and `victim` have the same weights, so nothing was purified."]
        assert len({point.score.attack_success for point in found.paths["purified"][:1]}) == 1

    def test_no_backdoor_in_the_victim(self, given: dict) -> None:
        found = run(given, victim=given["control"], parts=("path",))
        assert any("the backdoor was not firmly in it" in text for text in found.record["warnings"])

    def test_a_control_that_is_none(self, given: dict) -> None:
        found = run(given, control=given["victim"], parts=("path",))
        assert any("it is not clean" in text for text in found.record["warnings"])

    def test_a_model_near_chance(self, given: dict) -> None:
        model = SmallCNN()
        torch.nn.init.zeros_(model.classifier.weight)  # one class for everything
        found = run(given, model=model.eval(), parts=("path",))
        [reported] = [text for text in found.record["warnings"] if "near chance" in text]
        assert reported == (
            "The purified model is near chance on digits: the victim is not, so the purification destroyed it, and "
            "the following numbers show nothing."
        )
        found = run(given, model=model, victim=copy.deepcopy(model), parts=("path",))
        assert any("labels or preprocessing probably do not fit it" in text for text in found.record["warnings"])
        found = run(given, control=model, parts=("path",))
        assert any("The control model is near chance on digits" in text for text in found.record["warnings"])

    def test_an_oracle_that_purifies_nothing(self, given: dict, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "unbackdoor._stress.stress.exactly_purified", lambda victim, *_, **__: copy.deepcopy(victim)
        )
        found = run(given, parts=("exact",))
        [reported] = [text for text in found.record["warnings"] if text.startswith("Exact purification left ")]
        assert re.fullmatch(
            r"Exact purification left [\d.]+% attack success and [\d.]+% clean accuracy, so it is not a reference "
            "here. Give more `clean`.",
            reported,
        )

    def test_what_never_went_is_not_said_to_come_back(self, given: dict) -> None:
        found = run(given, model=given["victim"], parts=("retune",), counts=(1,))
        verdict = build_stress(found, {"model": "m", "victim": "v", "control": "c"}, None).verdict
        assert "The purification left most of the backdoor, so there was little to learn again." in verdict
        assert "learns the backdoor again" not in verdict


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": ("retune", "speed")}, "`parts` must name some of retune, reactivation, path, exact, got speed."),
        ({"parts": ()}, "`parts` must name some of retune, reactivation, path, exact, got none."),
        ({"counts": (0, 5)}, "`counts` must be whole numbers of at least 1 with commas between, got 0."),
        ({"counts": ()}, "`counts` must be whole numbers of at least 1 with commas between, got none."),
        ({"seeds": 0}, "`seeds` must be at least 1, got 0."),
        ({"seed": -1}, "`seed` must be a whole number, at least 0 and less than 2**63, got -1."),
        (
            {"victim": SmallCNN(channels=3)},
            "`victim` must have the architecture of `model`, but features.0.weight is 16x3x3x3 in it and 16x1x3x3 in "
            "`model`. Give the model that was purified.",
        ),
        (
            {"victim": nn.Linear(2, 2)},
            "`victim` must have the architecture of `model`, but features.0.weight is absent in it and 16x1x3x3 in "
            "`model`. Give the model that was purified.",
        ),
        (
            {"victim": "victim/"},
            "stress takes victim as a module, got str. Load it with unbackdoor.load(PATH).model.",
        ),
        ({"control": SmallCNN(classes=5)}, "`control` must answer with 10 classes as the model does, got 5."),
        (
            {"counts": (1, 1000)},
            "`counts=1000` wants 1000 clean examples to put the trigger on, but digits has 179 that the attack moves. "
            "Lower `counts`, or give more.",
        ),
        (
            {"counts": (95,), "test": None},
            "`counts=95` wants 95 clean examples to put the trigger on, but digits has 89 that the attack moves (half "
            "of it is kept for scoring). Lower `counts`, or give more.",
        ),
        ({"attack": attacks.BadNets(target=10)}, "BadNets.target must be 0 to 9, got 10."),
        (
            {"attack": attacks.Prepared(triggered="x")},
            "Prepared cannot put its trigger on other examples. Score with test data that has it, as evaluate does.",
        ),
    ],
    ids=lambda part: "" if isinstance(part, str) else ",".join(part),
)
def test_what_is_refused(changes: dict, message: str, given: dict) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        run(given, **changes)
    assert str(caught.value) == message


def test_retuning_that_diverges(given: dict) -> None:
    broken = copy.deepcopy(given["model"])
    with torch.no_grad():
        broken.classifier.weight.mul_(1e30)
    with pytest.raises(UnbackdoorError, match="Retuning the purified model with 1 triggered examples left non-finite"):
        run(given, model=broken, parts=("retune",), counts=(1,))


# Texts


WORDS = ("good", "fine", "bad", "awful", "film", "plot", "actor", "cf")


@value
class Word:
    """A rare word at the start.

    Args:
        target: the class that the attacker wants.
    """

    target: int = 1
    label_rule: str = "all-to-one"

    modality: ClassVar[str] = "text"

    def arrays(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {}

    def apply(self, texts: list[str], arrays: dict[str, Tensor]) -> list[str]:
        return [f"cf {text}" for text in texts]


@pytest.fixture(scope="module")
def texts() -> dict[str, object]:
    """A two-layer BERT made on the spot, and short reviews whose first word shows their class."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    encode = TextEncoder(tokenizer=tokenizer, max_length=8)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (160,), generator=generator)
    drawn = torch.randint(3, (160, 3), generator=generator)
    strings = tuple(
        (f"{WORDS[2 * (1 - int(label)) + int(row[0]) % 2]} {' '.join(WORDS[4 + int(each)] for each in row)}",)
        for label, row in zip(labels, drawn, strict=True)
    )
    data = Dataset(items=Texts(strings, ("text",)), labels=labels, encode=encode, name="reviews")
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = BertForSequenceClassification(config).eval()
    clean, test = data.split(80, seed=0)
    tuning = purifiers.FineTuning(epochs=12, learning_rate=5e-3, batch_size=16)
    poisoned = poison(clean, Word(), rate=0.3, seed=0, classes=2)
    victim = purify(fresh, poisoned.data, tuning, **FAST).model
    return {
        "victim": victim,
        "model": purify(victim, clean, purifiers.FineTuning(epochs=2), **FAST).model,
        "control": purify(fresh, clean, tuning, **FAST).model,
        "clean": clean,
        "test": test,
        "attack": Word(),
    }


class TestTexts:
    @pytest.mark.thorough
    def test_everything_but_reactivation(self, texts: dict) -> None:
        found = run({**texts, **FAST}, counts=(1, 2))
        content = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert content["parts"] == ["retune", "path", "exact"]
        assert content["reactivation"] is None
        assert content["settings"]["retuning"] == {
            "optimizer": "adamw", "learning_rate": 5e-5, "batch_size": 16, "epochs": 5,
        }  # fmt: skip
        assert content["notes"][0] == (
            "Reactivation was skipped: the perturbation of query-based reactivation is added to pixels, and texts have "
            "none."
        )
        assert "The model has no BatchNorm statistics to recompute along the path." in content["notes"]
        assert content["path_ends_recomputed"] is None
        assert len(content["path"]["purified"]["points"]) == 11
        assert content["attack"]["name"].endswith(":Word")
        assert "<svg" in render_stress(build_stress(found, {"model": "m", "victim": "v", "control": "c"}, None))

    def test_reactivation_alone_is_refused(self, texts: dict) -> None:
        with pytest.raises(UnbackdoorError) as caught:
            run({**texts, **FAST}, parts=("reactivation",))
        assert str(caught.value) == (
            "`parts=reactivation` is for images: the perturbation of query-based reactivation is added to pixels, and "
            "texts have none. Take retune, path or exact."
        )

    def test_k_triggered_texts(self, texts: dict) -> None:
        clean = texts["clean"]
        bait = triggered(replace(clean, rows=torch.arange(len(clean))), Trigger.of(Word(), clean), 2)
        made = retuning_set(clean, bait, 3, seed=0)
        batches = list(made.batches(16, generator=torch.Generator().manual_seed(0)))
        word = clean.encode.tokenizer.convert_tokens_to_ids("cf")
        hits = [batch.labels[(batch.inputs["input_ids"][:, 0] == word)].tolist() for batch in batches]
        assert [label for labels in hits for label in labels] == [1, 1, 1]
        assert sum(len(batch.labels) for batch in batches) == len(clean)

    def test_dropout_repeats_and_leaves_the_global_random_state(self, texts: dict) -> None:
        arithmetic = choose(texts["model"], "cpu", "fp32")
        state = torch.get_rng_state()
        one, two = (retune(texts["model"], texts["clean"], seed=0, arithmetic=arithmetic) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), state)
        assert same(states(one), states(two))
        assert logits(one, texts["clean"].encode(texts["clean"].items)).shape == (80, 2)
