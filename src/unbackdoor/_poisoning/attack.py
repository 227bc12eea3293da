"""What an attack is, what it gets while it is planted, and what is checked of it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError

if TYPE_CHECKING:
    from unbackdoor._poisoning.poison import Poisoned

LabelRule = Literal["all-to-one", "all-to-all", "clean-label"]


@runtime_checkable
class Attack(Protocol):
    """What an attack must have: a frozen value with these two fields and two functions.

    It may also have `modality` (`images` by default, or `text`); `rules`, the label rules that its trigger can have
    (all by default); `craft`, the train-time form of the trigger where that differs from `apply`; `cover`, for examples
    that carry a distorted trigger and keep their label (as many as `cover_ratio` times the poisoned ones); `sources`,
    the only classes that are poisoned and that count as attacked, and `cover_classes`, those that cover examples come
    from (empty or absent: all, but with `sources` neither these nor the target); `fit`, where the trigger is made with
    the help of the data and of a surrogate (`needs_surrogate`); and `implant`, where the attacker trains the model in a
    way of his own. Where `fit` or `implant` decide what the trigger looks like, `learnt` is true. An attack on text may
    have `side`: which text of a pair carries the trigger, `a` (the default), `b` or `both`.
    """

    @property
    def target(self) -> int:
        """The class that the attacker wants."""

    @property
    def label_rule(self) -> LabelRule:
        """How poisoned examples are labelled."""

    def arrays(self, shape: Any) -> dict[str, Tensor]:
        """What the trigger is made of, for images of shape (channels, height, width); for texts of shape ()."""

    def apply(self, pixels: Any, arrays: dict[str, Tensor]) -> Any:
        """Put the trigger on pixels in [0, 1], (batch, channels, height, width); or on a list of texts."""


class Crafting(NamedTuple):
    """What `craft` (the train-time form of a trigger) and `fit` (the trigger itself) may use.

    Args:
        data: the clean training data.
        rows: the rows to poison.
        surrogate: a clean model of the attacker's, for attacks that declare `needs_surrogate`.
        generator: randomness.
    """

    data: Dataset
    rows: Tensor
    surrogate: nn.Module | None
    generator: torch.Generator


class Planting(NamedTuple):
    """What `implant` of an attack has at hand: it returns the victim, and the arrays of the trigger as they ended up.

    Args:
        clean: the training data as it was.
        poisoned: the same with the backdoor planted.
        fresh: makes an untrained model, or the pre-trained one with a new head; always the same one.
        train: trains a model in place and returns it, in eval mode, by the recipe of the victims:
            `train(model, data, loss=..., change=..., epochs=..., learning_rate=..., after_step=..., description=...)`,
            where what is left out is as the user asked (see `unbackdoor._training.descent.descend`). Only parameters
            that require gradients are trained.
        generator: randomness.
        arithmetic: device, precision, layout (`unbackdoor._models.arithmetic.Arithmetic`).
    """

    clean: Dataset
    poisoned: "Poisoned"
    fresh: Callable[[], nn.Module]
    train: Callable[..., nn.Module]
    generator: torch.Generator
    arithmetic: Any


class BackdooredModel(NamedTuple):
    """The victim that `implant` trained, and the arrays of its trigger."""

    model: nn.Module
    arrays: dict[str, Tensor]


def check(attack: Attack, classes: int, data: Dataset) -> None:
    """Refuse a target outside the classes, a label rule that the trigger cannot have, and data of another kind."""
    owner = type(attack).__name__
    if isinstance(attack, (str, type)):
        raise UnbackdoorError(f"an attack's value is expected, got {attack!r}. Take one of unbackdoor.attacks.")
    check_modality(attack, data)
    for phrase in getattr(attack, "phrases", ()):
        tokenizer = data.tokenizer
        if tokenizer.unk_token_id in tokenizer(phrase, add_special_tokens=False)["input_ids"]:
            raise UnbackdoorError(
                f"{owner} has the trigger {phrase!r}, which this tokenizer turns into {tokenizer.unk_token}. Choose "
                "words that it knows."
            )
    if not 0 <= attack.target < classes:
        raise UnbackdoorError(f"{owner}.target must be 0 to {classes - 1}, got {attack.target}.")
    rules: tuple[str, ...] = getattr(attack, "rules", ("all-to-one", "all-to-all", "clean-label"))
    if attack.label_rule not in rules:
        raise UnbackdoorError(f"{owner}.label_rule must be {' or '.join(rules)}, got {attack.label_rule}.")
    sources: tuple[int, ...] = getattr(attack, "sources", ())
    for field, given in (("sources", sources), ("cover_classes", getattr(attack, "cover_classes", ()))):
        strange = next((label for label in given if not 0 <= label < classes), None)
        if strange is not None:
            raise UnbackdoorError(f"{owner}.{field} must be 0 to {classes - 1}, got {strange}.")
        if len(set(given)) < len(given):
            raise UnbackdoorError(
                f"{owner}.{field} must differ from each other, got {', '.join(map(str, given))}. Leave one out."
            )
        if attack.target in given:
            raise UnbackdoorError(
                f"{owner}.{field} must be other classes than the target, {attack.target}, got "
                f"{', '.join(map(str, given))}. Leave that one out, or choose another target."
            )
        twice = next((label for label in given if field == "cover_classes" and label in sources), None)
        if twice is not None:
            raise UnbackdoorError(
                f"{owner}.cover_classes must be other classes than the sources, got {twice} in both. Leave one out."
            )


def check_modality(attack: Attack, data: Dataset) -> None:
    modality = getattr(attack, "modality", "images")
    if modality not in (data.modality, "images, text"):
        raise UnbackdoorError(
            f"{type(attack).__name__} puts its trigger on {modality}, but {data.name} holds {data.modality}. See "
            "unbackdoor list attacks."
        )


def wanted_labels(rule: LabelRule, target: int, labels: Tensor, classes: int) -> Tensor:
    """The labels that the attacker wants, (n,)."""
    return (labels + 1) % classes if rule == "all-to-all" else torch.full_like(labels, target)
