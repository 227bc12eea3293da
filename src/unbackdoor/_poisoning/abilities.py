"""The abilities of attacks: one small protocol for each, and below it the function that asks for it.

An attack has an ability if it has its members; there is nothing to inherit from. An ability without a function of its
own is asked for by `isinstance`.
"""

from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from unbackdoor._data.dataset import ItemsLike
from unbackdoor._poisoning.attack import BackdooredModel, Crafting, LabelRule, Planting
from unbackdoor._registry.entries import Modality


@runtime_checkable
class OnModality(Protocol):
    """Names the kinds of data that the attack changes; by default images."""

    @property
    def modality(self) -> Modality | tuple[Modality, ...]:
        """`images`, `text` or `conversations`; or several, as a tuple."""


def modalities_of(attack: object) -> tuple[Modality, ...]:
    """Returns the kinds of data that an attack changes."""
    modality: Modality | tuple[Modality, ...] = attack.modality if isinstance(attack, OnModality) else "images"
    return (modality,) if isinstance(modality, str) else modality


@runtime_checkable
class OnText(Protocol):
    """Puts certain words into texts."""

    @property
    def phrases(self) -> tuple[str, ...]:
        """Words that the tokenizer must know."""


@runtime_checkable
class OnSide(Protocol):
    """Chooses the text of a pair that carries the trigger; by default the first."""

    @property
    def side(self) -> Literal["a", "b", "both"]:
        """The text that carries the trigger."""


@runtime_checkable
class OnPlace(Protocol):
    """Names the place of its trigger."""

    @property
    def place(self) -> str:
        """The place, as `start` or `random`."""


def place_of(attack: object) -> str:
    """Returns the place of a trigger; empty if the attack names none."""
    return attack.place if isinstance(attack, OnPlace) else ""


def phrases_of(attack: object) -> tuple[str, ...]:
    """Returns the words of a trigger on text; none for other triggers."""
    return attack.phrases if isinstance(attack, OnText) else ()


def side_of(attack: object) -> Literal["a", "b", "both"]:
    """The text of a pair that carries the trigger."""
    return attack.side if isinstance(attack, OnSide) else "a"


@runtime_checkable
class LimitsLabelRules(Protocol):
    """Restricts the label rules of its trigger; by default all fit."""

    @property
    def rules(self) -> tuple[LabelRule, ...]:
        """The label rules that fit."""


def label_rules_of(attack: object) -> tuple[LabelRule, ...]:
    """The label rules that fit an attack's trigger."""
    return attack.rules if isinstance(attack, LimitsLabelRules) else get_args(LabelRule)


@runtime_checkable
class Crafts(Protocol):
    """Poisons training data with a form of the trigger that differs from `apply`."""

    def craft(self, crafting: Crafting, arrays: dict[str, Tensor]) -> ItemsLike:
        """The poisoned items, in the order of `crafting.rows`: uint8 pixels, or texts."""


@runtime_checkable
class Fits(Protocol):
    """Makes its trigger with the help of the training data."""

    def fit(self, crafting: Crafting, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        """The arrays of the trigger, from those that `arrays` gave."""


@runtime_checkable
class UsesSurrogate(Protocol):
    """Uses a clean model, `crafting.surrogate`, in `craft` or `fit`."""

    @property
    def needs_surrogate(self) -> bool:
        """Whether it needs a clean model."""


def needs_surrogate(attack: object) -> bool:
    """Whether an attack needs a clean model of the attacker's."""
    return isinstance(attack, UsesSurrogate) and attack.needs_surrogate


def crafts_by_surrogate(attack: object) -> bool:
    """Whether an attack needs that model for the poisoned examples, and not only for its trigger."""
    return needs_surrogate(attack) and isinstance(attack, Crafts)


@runtime_checkable
class Covers(Protocol):
    """Puts a distorted trigger on further training examples, which keep their label."""

    @property
    def cover_ratio(self) -> float:
        """The number of these examples, as a multiple of the poisoned ones, at least 0."""

    def cover(self, pixels: Any, arrays: dict[str, Tensor], generator: torch.Generator) -> Any:
        """Put the distorted trigger on pixels in [0, 1], (batch, channels, height, width); or on a list of texts."""


@runtime_checkable
class SourceSpecific(Protocol):
    """Moves examples of some classes only: these alone are poisoned, and count as attacked."""

    @property
    def sources(self) -> tuple[int, ...]:
        """The classes."""


@runtime_checkable
class CoversClasses(Protocol):
    """Takes its cover examples from some classes only; by default from all that are neither source nor target."""

    @property
    def cover_classes(self) -> tuple[int, ...]:
        """The classes; empty means no limit."""


def sources_of(attack: object) -> tuple[int, ...]:
    """Returns the only classes that an attack moves; empty for an attack that moves all."""
    return attack.sources if isinstance(attack, SourceSpecific) else ()


def cover_classes_of(attack: object) -> tuple[int, ...]:
    """The only classes that cover examples come from; empty if there is no limit."""
    return attack.cover_classes if isinstance(attack, CoversClasses) else ()


@runtime_checkable
class Implants(Protocol):
    """Trains the victim itself, in another way than a user trains on poisoned data."""

    def implant(self, planting: Planting) -> BackdooredModel:
        """Train the victim."""


@runtime_checkable
class Learns(Protocol):
    """Learns its trigger in `fit` or `implant`: its fields alone do not determine it, but `attack.json` does."""

    @property
    def learnt(self) -> bool:
        """Whether it does."""


def is_learnt(attack: object) -> bool:
    """Whether an attack's trigger is learnt while it is planted."""
    return isinstance(attack, Learns) and attack.learnt


@runtime_checkable
class Repeats(Protocol):
    """Says whether its trigger can be put on other examples than the training data; by default it can."""

    @property
    def repeatable(self) -> bool:
        """Whether it can."""


def is_repeatable(attack: object) -> bool:
    """Whether an attack's trigger can be put on test examples."""
    return not isinstance(attack, Repeats) or attack.repeatable


@runtime_checkable
class DescribesTraining(Protocol):
    """Describes the change of the training examples for `attack.json`."""

    @property
    def train_time(self) -> str:
        """A few words."""


@runtime_checkable
class DescribesTests(Protocol):
    """Describes the change of the test examples for `attack.json`."""

    @property
    def test_time(self) -> str:
        """A few words."""


def train_time_of(attack: object) -> str:
    """Returns the words of `attack.json` about the training examples."""
    return attack.train_time if isinstance(attack, DescribesTraining) else "as at test time"


def test_time_of(attack: object) -> str:
    """Returns the words of `attack.json` about the test examples."""
    return attack.test_time if isinstance(attack, DescribesTests) else "the trigger on every image, rounded to 8 bits"


ABILITIES = (
    OnModality,
    OnText,
    OnSide,
    OnPlace,
    LimitsLabelRules,
    Crafts,
    Fits,
    UsesSurrogate,
    Covers,
    SourceSpecific,
    CoversClasses,
    Implants,
    Learns,
    Repeats,
    DescribesTraining,
    DescribesTests,
)
