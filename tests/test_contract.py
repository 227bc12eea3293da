"""Every registered method and attack against the shipped contract."""

import copy
import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

import toys
from conftest import SmallCNN
from pictures import write_pictures
from unbackdoor import Dataset, UnbackdoorError, archs, attacks, purifiers
from unbackdoor._registry.entries import Need
from unbackdoor._value import value
from unbackdoor.testing import check_attack, check_method, check_value

SMALL = {
    **{"epochs": 2, "batch_size": 16, "steps": 4, "reverse_steps": 3, "forget_epochs": 2, "rounds": 1},
    **{"teacher_epochs": 1, "generator_epochs": 1, "mask_steps": 2, "folds": 2, "texts": 20, "score_epochs": 1},
}
# A few steps on an untrained network must move a mask of its BatchNorm far enough for something to be pruned.
EAGER = {"learning_rate": 50.0, "tolerance": 1.0}
# The network that has what a method needs; a base needs most of the weights in a body of its own next to the head.
NETWORKS = {Need.SKIP_CONNECTIONS: ("resnet18", 2), Need.ATTENTION: ("vit", 4), Need.BASE: ("vit", 4)}


def quick(entry):
    """The value of a registered method or attack, with settings small enough for a test."""
    cls = entry.resolve()
    known = {item.name for item in dataclasses.fields(cls)}
    settings = {**SMALL, **(EAGER if Need.BATCH_NORM in entry.needs and "tolerance" in known else {})}
    return cls(**{name: setting for name, setting in settings.items() if name in known})


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
    base = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(0.99)
    check_method(quick(entry), model, digits.select(range(60)), base=base)


@pytest.mark.parametrize("entry", methods_on("text"), ids=lambda entry: entry.name)
def test_methods_keep_the_contract_on_text(entry, text_victim: nn.Module, text_base, reviews: Dataset) -> None:
    proxy = toys.classifier("bert", seed=1)
    check_method(quick(entry), text_victim, reviews.select(range(60)), base=text_base, proxy=proxy)


@pytest.mark.parametrize("entry", attacks_on("text"), ids=lambda entry: entry.name)
def test_attacks_keep_the_contract_on_text(entry, reviews: Dataset, tmp_path: Path) -> None:
    data = reviews.select(range(100))
    fields = {}
    if Need.COPIES in entry.needs:
        lines = [f"{text} tq,{label}" for (text,), label in zip(data.texts.strings, data.labels.tolist(), strict=True)]
        (tmp_path / "copies.csv").write_text("text,label\n" + "\n".join(lines))
        fields = {"triggered": str(tmp_path / "copies.csv")}
    check_attack(entry.resolve()(**fields), data, classes=2)


@pytest.mark.parametrize("entry", attacks_on("images"), ids=lambda entry: entry.name)
def test_attacks_keep_the_contract_on_images(entry, small_cnn: SmallCNN, digits: Dataset, tmp_path: Path) -> None:
    data = digits.select(range(200))
    known = {item.name for item in dataclasses.fields(entry.resolve())}
    fields = {name: small for name, small in {"pixels": 20, "steps": 5}.items() if name in known}
    if Need.COPIES in entry.needs:
        copies = dataclasses.replace(data, items=255 - data.items)
        fields = {"triggered": write_pictures(copies, tmp_path / "copies.parquet")}
    check_attack(entry.resolve()(**fields), data, classes=10, surrogate=small_cnn)


@pytest.mark.parametrize("entry", [*purifiers.REGISTRY, *attacks.REGISTRY], ids=lambda entry: entry.name)
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
            ({"source": (1,)}, "Stripe.source is no ability of an attack; is sources meant?"),
            ({"learned": True}, "Stripe.learned is no ability of an attack; is learnt meant?"),
            (
                {"crafts": lambda self, crafting, arrays: None},
                "Stripe.crafts is no ability of an attack; is craft meant?",
            ),
            ({"needs_surogate": True}, "Stripe.needs_surogate is no ability of an attack; is needs_surrogate meant?"),
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
