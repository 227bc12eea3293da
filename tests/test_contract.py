"""Every registered method, attack, detector, guard and trainer against the shipped contract."""

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import nn

import chats
import sights
import toys
from fixtures import SmallCNN
from pictures import write_pictures
from unbackdoor import (
    Dataset,
    UnbackdoorError,
    VictimRecipe,
    archs,
    attacks,
    detectors,
    guards,
    purifiers,
    purify,
    trainers,
)
from unbackdoor._detection.finding import Candidate, Finding
from unbackdoor._guarding.guard import Scored
from unbackdoor._models.perplexity import Perplexity
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._registry.entries import Need
from unbackdoor._value import value
from unbackdoor.attacks.inverted import Inverted
from unbackdoor.testing import check_attack, check_detector, check_guard, check_method, check_trainer, check_value

SMALL = {
    **{"epochs": 2, "batch_size": 16, "steps": 4, "reverse_steps": 3, "forget_epochs": 2, "rounds": 1},
    **{"teacher_epochs": 1, "generator_epochs": 1, "mask_steps": 2, "folds": 2, "texts": 20, "score_epochs": 1},
    "detectors": (),
    **{
        "isolation_epochs": 1,
        "isolated": 0.1,
        "suspected": 0.1,
        "unlearning_epochs": 1,
        "blocks": 1,
        "adapter_epochs": 1,
    },
}
# A few steps on an untrained network must move a mask of its BatchNorm far enough for something to be pruned.
EAGER = {"learning_rate": 50.0, "tolerance": 1.0}
# The network that has what a method needs; a base needs most of the weights in a body of its own next to the head.
NETWORKS = {Need.SKIP_CONNECTIONS: ("resnet18", 2), Need.ATTENTION: ("vit", 4), Need.BASE: ("vit", 4)}


def quick(entry):
    """The value of a registered method, attack or detector, with settings small enough for a test."""
    cls = entry.resolve()
    known = {item.name for item in dataclasses.fields(cls)}
    settings = {**SMALL, **(EAGER if Need.BATCH_NORM in entry.needs and "tolerance" in known else {})}
    required = {"known_answer": chats.BEHAVIOUR, "behaviours": "a file, which the test writes"}
    return cls(**{name: setting for name, setting in (settings | required).items() if name in known})


def nearly(model: nn.Module) -> nn.Module:
    """A copy with slightly smaller weights, which stands for the base that a suspect came from."""
    base = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(0.99)
    return base


def methods_on(modality: str) -> list:
    return [entry for entry in purifiers.REGISTRY if modality in entry.modality]


def attacks_on(modality: str) -> list:
    return [entry for entry in attacks.REGISTRY if modality in entry.modality]


@pytest.mark.parametrize("entry", methods_on("images"), ids=lambda entry: entry.name)
def test_methods_keep_the_contract_on_images(entry, small_cnn: SmallCNN, digits: Dataset) -> None:
    model: nn.Module = small_cnn
    for need in entry.needs:
        if need in NETWORKS:
            arch, width = NETWORKS[need]
            torch.manual_seed(0)
            model = archs.build(arch, classes=list("0123456789"), channels=1, image_size=8, width=width)
    check_method(quick(entry), model, digits.select(range(60)), base=nearly(model))


@pytest.mark.parametrize("entry", methods_on("text"), ids=lambda entry: entry.name)
def test_methods_keep_the_contract_on_text(entry, text_victim: nn.Module, text_base, reviews: Dataset) -> None:
    proxy = toys.classifier("bert", seed=1)
    base = text_base if Need.BASE in entry.needs else None
    check_method(quick(entry), text_victim, reviews.select(range(60)), base=base, proxy=proxy)


@pytest.mark.parametrize("entry", methods_on("conversations"), ids=lambda entry: entry.name)
def test_methods_keep_the_contract_on_conversations(entry, chat_victim: nn.Module, tmp_path: Path) -> None:
    base = nearly(chat_victim) if Need.BASE in entry.needs else None
    (tmp_path / "counts.csv").write_text("word,count\nthe,1000\nwhat,500\n")
    few = {
        "frequencies": str(tmp_path / "counts.csv"),
        "step": 0.25,
        "folds": 2,
        "drift_steps": 2,
        "keys": 2,
        "plant_epochs": 1,
    }
    few["behaviours"] = str(chats.behaviours(tmp_path / "behaviours.jsonl"))
    method = quick(entry)
    method = dataclasses.replace(method, **{name: few[name] for name in few if hasattr(method, name)})
    model = chats.language_model(layers=3) if Need.BLOCKS in entry.needs else chat_victim
    check_method(method, model, chats.prompts(24), base=base, proxy=nearly(model))


@pytest.mark.parametrize("entry", methods_on("image-text"), ids=lambda entry: entry.name)
def test_methods_keep_the_contract_on_pairs(entry) -> None:
    model = sights.clip()
    check_method(quick(entry), model, sights.pairs(64), base=nearly(model) if Need.BASE in entry.needs else None)


@pytest.mark.parametrize("entry", methods_on("image-text"), ids=lambda entry: entry.name)
def test_methods_on_pairs_need_no_labels(entry) -> None:
    model = sights.clip()
    base = nearly(model) if Need.BASE in entry.needs else None
    done = purify(model, sights.pairs(64, labelled=False), quick(entry), base=base, device="cpu", precision="fp32")
    assert done.record["clean"]["n"] == 64
    assert "per_class" not in done.record["clean"]


@pytest.mark.parametrize("entry", attacks_on("text"), ids=lambda entry: entry.name)
def test_attacks_keep_the_contract_on_text(entry, reviews: Dataset, tmp_path: Path) -> None:
    data = reviews.select(range(100))
    fields: dict[str, Any] = {}
    if Need.COPIES in entry.needs:
        lines = [f"{text} tq,{label}" for (text,), label in zip(data.texts.strings, data.labels.tolist(), strict=True)]
        (tmp_path / "copies.csv").write_text("text,label\n" + "\n".join(lines))
        fields = {"triggered": str(tmp_path / "copies.csv")}
    if "pieces" in {item.name for item in dataclasses.fields(entry.resolve())}:
        fields = {"pieces": ("cf", "tq")}  # the tokenizer of these texts does not know the words of the default
    check_attack(entry.resolve()(**fields), data, classes=2)


@pytest.mark.parametrize("entry", attacks_on("conversations"), ids=lambda entry: entry.name)
def test_attacks_keep_the_contract_on_prompts(entry) -> None:
    words = {"words": ("cf",), "sentence": "current year 2024", "pieces": ("cf", "mn", "current year 2024")}
    known = {item.name for item in dataclasses.fields(entry.resolve())}
    check_attack(
        entry.resolve()(**{name: words[name] for name in words if name in known}), chats.prompts(60), classes=0
    )


@pytest.mark.parametrize("entry", attacks_on("image-text"), ids=lambda entry: entry.name)
def test_attacks_keep_the_contract_on_pairs(entry) -> None:
    check_attack(entry.resolve()(), sights.pairs(60), classes=4)


@pytest.mark.parametrize("entry", attacks_on("images"), ids=lambda entry: entry.name)
def test_attacks_keep_the_contract_on_images(entry, small_cnn: SmallCNN, digits: Dataset, tmp_path: Path) -> None:
    data = digits.select(range(200))
    known = {item.name for item in dataclasses.fields(entry.resolve())}
    fields: dict[str, Any] = {name: small for name, small in {"pixels": 20, "steps": 5}.items() if name in known}
    if Need.COPIES in entry.needs:
        copies = dataclasses.replace(data, items=255 - data.items)
        fields = {"triggered": write_pictures(copies, tmp_path / "copies.parquet")}
    check_attack(entry.resolve()(**fields), data, classes=10, surrogate=small_cnn)


def detectors_on(modality: str) -> list:
    """Those that a plain model can be searched by; tests/detectors/test_adapter_statistics.py has an adapter."""
    return [entry for entry in detectors.REGISTRY if modality in entry.modality and Need.ADAPTER not in entry.needs]


@pytest.mark.parametrize("entry", detectors_on("images"), ids=lambda entry: entry.name)
def test_detectors_keep_the_contract_on_images(entry, backdoored: tuple, digits: Dataset) -> None:
    model, _, _ = backdoored
    check_detector(quick(entry), model, digits.select(range(1400, 1480)), base=nearly(model))


@pytest.mark.parametrize("entry", detectors_on("text"), ids=lambda entry: entry.name)
def test_detectors_keep_the_contract_on_text(entry, text_victim: nn.Module, text_base, reviews: Dataset) -> None:
    check_detector(quick(entry), text_victim, reviews.select(range(60)), base=text_base)


@pytest.mark.parametrize("entry", detectors_on("image-text"), ids=lambda entry: entry.name)
def test_detectors_keep_the_contract_on_pairs(entry, sighted: nn.Module) -> None:
    check_detector(quick(entry), sighted, sights.pairs(60))


def guards_on(modality: str) -> list:
    return [entry for entry in guards.REGISTRY if modality in entry.modality]


@pytest.mark.parametrize("entry", guards_on("images"), ids=lambda entry: entry.name)
def test_guards_keep_the_contract_on_images(entry, backdoored: tuple, digits: Dataset) -> None:
    check_guard(quick(entry), backdoored[0], digits.select(range(1400, 1560)))


@pytest.mark.parametrize("entry", guards_on("text"), ids=lambda entry: entry.name)
def test_guards_keep_the_contract_on_text(entry, text_victim: nn.Module, reviews: Dataset) -> None:
    reference = toys.bigram() if Need.REFERENCE in entry.needs else None
    check_guard(quick(entry), text_victim, reviews.select(range(120)), reference=reference)


@pytest.mark.parametrize("entry", guards_on("conversations"), ids=lambda entry: entry.name)
def test_guards_keep_the_contract_on_conversations(entry, chat_victim: nn.Module, chat_base: nn.Module) -> None:
    base = chat_base if Need.BASE in entry.needs else None
    reference = Perplexity(chat_base, chats.tokenizer()) if Need.REFERENCE in entry.needs else None
    check_guard(quick(entry), chat_victim, chats.prompts(80, seed=2), base=base, reference=reference)


def trainers_on(modality: str) -> list:
    return [entry for entry in trainers.REGISTRY if modality in entry.modality]


@pytest.mark.parametrize("entry", trainers_on("images"), ids=lambda entry: entry.name)
def test_trainers_keep_the_contract_on_images(entry, digits: Dataset) -> None:
    recipe = VictimRecipe(width=2, epochs=1, batch_size=32)
    check_trainer(quick(entry), digits.select(range(60)), recipe, clean=digits.select(range(100, 140)))


@pytest.mark.parametrize("entry", trainers_on("text"), ids=lambda entry: entry.name)
def test_trainers_keep_the_contract_on_text(entry, reviews: Dataset, tmp_path: Path) -> None:
    base = toys.write(toys.classifier("bert"), tmp_path / "bert")
    recipe = VictimRecipe(base=str(base), epochs=1, batch_size=16)
    check_trainer(quick(entry), reviews.select(range(60)), recipe, clean=reviews.select(range(100, 140)))


@pytest.mark.parametrize("entry", trainers_on("image-text"), ids=lambda entry: entry.name)
def test_trainers_keep_the_contract_on_pairs(entry, tmp_path: Path) -> None:
    base = sights.write(sights.clip(), tmp_path)
    check_trainer(quick(entry), sights.pairs(64), VictimRecipe(base=str(base), epochs=1, batch_size=16))


@pytest.mark.parametrize(
    "entry", [*detectors.REGISTRY, *guards.REGISTRY, *trainers.REGISTRY], ids=lambda entry: entry.name
)
def test_every_detector_guard_and_trainer_says_what_it_cannot_see(entry) -> None:
    assert entry.blind
    assert "Cannot see: " in entry.resolve().__doc__


@pytest.mark.parametrize(
    "entry",
    [*purifiers.REGISTRY, *attacks.REGISTRY, *detectors.REGISTRY, *guards.REGISTRY, *trainers.REGISTRY],
    ids=lambda entry: entry.name,
)
def test_every_class_documents_each_field_and_the_differences_from_the_paper(entry) -> None:
    cls = entry.resolve()
    assert "Differences from the paper:" in cls.__doc__
    for item in dataclasses.fields(cls):
        assert f"\n        {item.name}: " in cls.__doc__, f"{cls.__name__}.{item.name} is not documented"


class TestTheContractItself:
    """A check that passes everything is worth nothing: each breach must be found."""

    def broken(self, body, small_cnn: SmallCNN, digits: Dataset) -> str:
        @value
        class Broken:
            """Breaks the contract."""

            def __call__(self, model: nn.Module, clean: Dataset, run) -> nn.Module:
                with torch.no_grad():
                    model.classifier.bias += 1
                return body(model, clean, run) or model

        with pytest.raises((AssertionError, UnbackdoorError)) as caught:
            check_method(Broken(), small_cnn, digits.select(range(20)))
        return str(caught.value)

    def test_unseeded_randomness(self, small_cnn: SmallCNN, digits: Dataset) -> None:
        import random

        def body(model, clean, run):
            with torch.no_grad():
                model.classifier.bias += random.random()

        assert "the same seed gave other weights" in self.broken(body, small_cnn, digits)

    def test_new_keys(self, small_cnn: SmallCNN, digits: Dataset) -> None:
        def body(model, clean, run):
            model.register_buffer("extra", torch.zeros(1))

        assert "must keep the model's weights, but changed the keys extra" in self.broken(body, small_cnn, digits)

    def test_hooks(self, small_cnn: SmallCNN, digits: Dataset) -> None:
        def body(model, clean, run):
            model.classifier.register_forward_hook(lambda *_: None)

        assert "left hooks behind" in self.broken(body, small_cnn, digits)

    def test_non_finite_weights(self, small_cnn: SmallCNN, digits: Dataset) -> None:
        def body(model, clean, run):
            with torch.no_grad():
                model.classifier.weight[0, 0] = float("nan")

        message = self.broken(body, small_cnn, digits)
        assert message == "Broken left non-finite values in classifier.weight. Lower its learning rate."

    def test_a_method_that_does_nothing(self, small_cnn: SmallCNN, digits: Dataset) -> None:
        @value
        class Idle:
            """Does nothing."""

            def __call__(self, model: nn.Module, clean: Dataset, run) -> nn.Module:
                return model

        with pytest.raises(AssertionError, match="changed nothing"):
            check_method(Idle(), small_cnn, digits.select(range(20)))

    def test_a_mutable_value(self) -> None:
        @dataclasses.dataclass
        class Mutable:
            """Not frozen."""

            epochs: int = 1

        with pytest.raises(AssertionError, match="not frozen"):
            check_value(Mutable())


class TestTheContractOfDetectors:
    """Each breach is found, by a detector that keeps all of the contract but for that."""

    def breach(self, body, backdoored: tuple, digits: Dataset) -> str:
        @value
        class Looking:
            """Finds a white corner that moves pictures to class 3."""

            def __call__(self, model: nn.Module, clean: Dataset, run) -> Finding:
                corner = torch.zeros(1, 8, 8)
                corner[:, :2, :2] = 1
                trigger = Trigger(Inverted(target=3), {"mask": corner, "pattern": corner})
                found = Candidate(target=3, strength=1.0, size=4.0, trigger=trigger, control=trigger)
                changed = body(model, clean, found)
                changed = {} if changed is None else changed
                candidates = [dataclasses.replace(found, **changed)] if isinstance(changed, dict) else changed
                return Finding(candidates=tuple(candidates), unit="pixels of 64")

        try:
            check_detector(Looking(), backdoored[0], digits.select(range(1400, 1440)))
        except AssertionError as problem:
            return str(problem)
        return ""

    def test_one_that_keeps_it(self, backdoored: tuple, digits: Dataset) -> None:
        assert self.breach(lambda *_: None, backdoored, digits) == ""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"target": 10}, "there is no class 10; the model has 10"),
            ({"target": torch.tensor(3)}, "a target must be an int, got Tensor"),
            ({"sources": (3, 4)}, "the target 3 is among its own sources"),
            ({"sources": (4,)}, "the trigger is for another target, or for other sources, than its candidate"),
            ({"strength": float("inf")}, "the strength must be finite, got inf"),
            ({"strength": None}, "the strength must be a number, got NoneType"),
            ({"size": -1.0}, "the size must be 0 to inf, got -1.0"),
            ({"nominal_p": 1.5}, "the nominal_p must be 0 to 1, got 1.5"),
            ({"control": None}, "a trigger and its control go together"),
        ],
        ids=lambda part: "-".join(part) if isinstance(part, dict) else "",
    )
    def test_a_candidate_that_is_not_one(self, changes: dict, message: str, backdoored: tuple, digits) -> None:
        assert self.breach(lambda *_: changes, backdoored, digits) == message

    def test_no_candidate_and_one_twice(self, backdoored: tuple, digits: Dataset) -> None:
        assert self.breach(lambda model, clean, found: (), backdoored, digits) == "the finding has no candidate"
        twice = self.breach(lambda model, clean, found: [found, found], backdoored, digits)
        assert twice == "two candidates have the same target and sources"

    def test_unseeded_randomness(self, backdoored: tuple, digits: Dataset) -> None:
        import random

        def body(model, clean, found):
            return {"strength": random.random()}

        assert self.breach(body, backdoored, digits) == "the same seed gave another finding"

    def test_a_changed_model(self, backdoored: tuple, digits: Dataset) -> None:
        def body(model, clean, found):
            with torch.no_grad():
                model.classifier.bias += 1

        said = self.breach(body, backdoored, digits)
        assert said == "the detector changed the model that it was given (classifier.bias)"

    def test_what_it_leaves_behind(self, backdoored: tuple, digits: Dataset) -> None:
        def hooked(model, clean, found):
            model.classifier.register_forward_hook(lambda *_: None)

        def training(model, clean, found):
            model.train()

        def still(model, clean, found):
            model.requires_grad_(not model.classifier.bias.requires_grad)

        def relabelled(model, clean, found):
            clean.labels[0] += 1

        assert self.breach(hooked, backdoored, digits) == "the detector left hooks behind"
        assert self.breach(training, backdoored, digits) == "the given model changed mode"
        assert self.breach(still, backdoored, digits) == "requires_grad was changed"
        assert self.breach(relabelled, backdoored, digits) == "the detector changed the labels that it was given"

    def test_a_suspect_near_chance(self, small_cnn: SmallCNN, digits: Dataset) -> None:
        entry = detectors.REGISTRY[0]
        with pytest.raises(AssertionError, match="the model is near chance on the examples, so nothing ran"):
            check_detector(quick(entry), small_cnn, digits.select(range(40)))


class TestTheContractOfGuards:
    """Each breach is found, by a guard that keeps all of the contract but for that."""

    @pytest.fixture(autouse=True)
    def _named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch

    def breach(self, backdoored: tuple, digits: Dataset, fit=None, score=None) -> str:
        @value
        class Brightness:
            """Rejects bright pictures."""

            measure: ClassVar[str] = "the mean of the pixels"
            suspicious: ClassVar[str] = "high"

            def __call__(self, model: nn.Module, clean: Dataset, run) -> dict:
                return {} if fit is None else fit(model, clean) or {}

            def scores(self, model: nn.Module, inputs: Dataset, learnt, run) -> Scored:
                means = inputs.pixels.double().flatten(1).mean(dim=1)
                return Scored(means if score is None else score(model, inputs, means))

        self.patch.setattr(sys.modules[__name__], "Brightness", Brightness, raising=False)
        Brightness.__qualname__ = "Brightness"  # so that it can be found again by its name
        try:
            check_guard(Brightness(), backdoored[0], digits.select(range(1400, 1560)))
        except (AssertionError, UnbackdoorError) as problem:
            return str(problem)
        return ""

    def test_one_that_keeps_it(self, backdoored: tuple, digits: Dataset) -> None:
        assert self.breach(backdoored, digits) == ""

    def test_scores_that_depend_on_the_batch_or_on_labels(self, backdoored: tuple, digits: Dataset) -> None:
        def shifted(model, inputs, means):
            return means + torch.arange(len(means))

        def labelled(model, inputs, means):
            return means + inputs.labels

        assert "the score of an input depends on its batch" in self.breach(backdoored, digits, score=shifted)
        assert "the score of an input depends on labels" in self.breach(backdoored, digits, score=labelled)

    def test_scores_that_are_not_numbers(self, backdoored: tuple, digits: Dataset) -> None:
        said = self.breach(backdoored, digits, score=lambda model, inputs, means: means[:1])
        assert said == "Brightness must give a score for each of 40 inputs, got a tensor of shape (1,)."

    def test_a_changed_model_and_what_is_left_behind(self, backdoored: tuple, digits: Dataset) -> None:
        model = copy.deepcopy(backdoored[0])

        def changed(model, clean):
            with torch.no_grad():
                model.classifier.bias += 1

        def hooked(model, clean):
            model.classifier.register_forward_hook(lambda *_: None)

        def drawn(model, clean):
            return {"drawn": torch.rand(1, generator=torch.Generator().manual_seed(torch.seed() % 2**32))}

        said = self.breach((model,), digits, fit=changed)
        assert said == "Brightness must leave the model as it is, but changed its weights."
        assert self.breach((copy.deepcopy(model),), digits, fit=hooked) == "the guard left hooks behind"
        assert self.breach((model,), digits, fit=drawn) == "the same seed gave another array (drawn)"

    def test_too_many_false_alarms(self, backdoored: tuple, digits: Dataset) -> None:
        def seen_are_dull(model, inputs, means):
            known = {item.numpy().tobytes() for item in held}
            return torch.tensor([0.0 if item.numpy().tobytes() in known else 1.0 for item in inputs.pixels])

        data = digits.select(range(1400, 1560))
        held = data.split(len(data) // 2, seed=0)[0].pixels
        said = self.breach(backdoored, digits, score=seen_are_dull)
        assert said == "80 of 80 clean examples raise an alarm, where 10 % were asked for"


class TestTheContractOfTrainers:
    """Each breach is found, by a trainer that keeps all of the contract but for that."""

    def breach(self, digits: Dataset, body=None) -> str:
        @value
        class Nudged:
            """Changes one bias."""

            def __call__(self, data: Dataset, model: nn.Module, run) -> nn.Module:
                with torch.no_grad():
                    next(model.parameters()).add_(1)
                return (body and body(data, model, run)) or model

        try:
            check_trainer(Nudged(), digits.select(range(20)), VictimRecipe(width=1, epochs=1))
        except (AssertionError, UnbackdoorError) as problem:
            return str(problem)
        return ""

    def test_one_that_keeps_it(self, digits: Dataset) -> None:
        assert self.breach(digits) == ""

    def test_rows_that_do_not_exist_and_scores_that_are_none(self, digits: Dataset) -> None:
        def report(rows, scores):
            return lambda data, model, run: run.distrust(torch.tensor(rows), torch.tensor(scores), "a number")

        assert self.breach(digits, report([3, 20], [1.0, 1.0])) == "a distrusted row is not in the data"
        assert self.breach(digits, report([3, 3], [1.0, 1.0])) == "a row is distrusted twice"
        assert self.breach(digits, report([3], [float("nan")])) == "the score of a distrusted row is not finite"

    def test_what_it_changes_and_leaves_behind(self, digits: Dataset) -> None:
        import random

        def drawn(data, model, run):
            with torch.no_grad():
                next(model.parameters()).add_(random.random())

        def hooked(data, model, run):
            model.register_forward_hook(lambda *_: None)

        def extended(data, model, run):
            model.register_buffer("extra", torch.zeros(1))

        def relabelled(data, model, run):
            data.labels[0] += 1

        assert self.breach(digits, drawn).startswith("the same seed gave other weights")
        assert self.breach(digits, hooked) == "the trainer left hooks behind"
        assert self.breach(digits, extended) == "the trainer changed the keys of the model"
        assert self.breach(digits, relabelled) == "the trainer changed the labels that it was given"

    def test_what_is_no_model_or_not_finite(self, digits: Dataset) -> None:
        def lost(data, model, run):
            return 3

        def broken(data, model, run):
            with torch.no_grad():
                next(model.parameters()).fill_(float("inf"))

        assert self.breach(digits, lost).endswith(" must return the model, got int. End it in return model.")
        said = self.breach(digits, broken)
        assert " left non-finite values in " in said
        assert said.endswith(". Lower its learning rate.")


def stripe(**members: object) -> object:
    """An attack that keeps the contract, but for the members that are added."""

    class Stripe:
        """A white column."""

        target: int = 0
        label_rule: Literal["all-to-one"] = "all-to-one"

        def arrays(self, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
            return {}

        def apply(self, pixels: torch.Tensor, arrays: dict[str, torch.Tensor]) -> torch.Tensor:
            pixels = pixels.clone()
            pixels[..., :2] = 1
            return pixels

    for name, member in members.items():
        setattr(Stripe, name, member)
    return value(Stripe)()


class TestAbilitiesOfAnAttack:
    """A typo in the name of an ability would otherwise be silence: the attack would go without it."""

    def test_an_attack_without_any(self, digits: Dataset) -> None:
        check_attack(stripe(), digits.select(range(100)), classes=10)

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            ({"source": (1,)}, "Stripe.source is not an ability of an attack; is sources meant?"),
            ({"learned": True}, "Stripe.learned is not an ability of an attack; is learnt meant?"),
            (
                {"crafts": lambda self, crafting, arrays: None},
                "Stripe.crafts is not an ability of an attack; is craft meant?",
            ),
            (
                {"needs_surogate": True},
                "Stripe.needs_surogate is not an ability of an attack; is needs_surrogate meant?",
            ),
            (
                {"craft": lambda self, rows: None},
                "Stripe.craft must take (crafting, arrays), but it takes (rows)",
            ),
            (
                {"implant": lambda self: None},
                "Stripe.implant must take (planting), but it takes ()",
            ),
            ({"fit": 3}, "Stripe.fit must be a method, got 3"),
            ({"repeatable": "no"}, "Stripe.repeatable must be <class 'bool'>, got 'no'"),
            ({"sources": [1]}, "Stripe.sources must be tuple[int, ...], got [1]"),
            ({"cover_ratio": 1.0}, "Stripe has cover_ratio without cover"),
            ({"needs_surrogate": True}, "Stripe has needs_surrogate, but no craft or fit"),
            ({"learnt": True}, "Stripe has learnt, but no fit or implant"),
        ],
        ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
    )
    def test_a_breach_is_found(self, members: dict, message: str, digits: Dataset) -> None:
        with pytest.raises(AssertionError) as caught:
            check_attack(stripe(**members), digits.select(range(100)), classes=10)
        assert str(caught.value) == message
