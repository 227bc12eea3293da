"""The members that each attack has, and the material that it gets while it is planted."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset

LabelRule = Literal["all-to-one", "all-to-all", "clean-label"]


@runtime_checkable
class Attack(Protocol):
    """The members that each attack has: a frozen value with these two fields and two functions.

    `unbackdoor._poisoning.abilities` declares what else an attack may have, one small protocol per ability.
    `unbackdoor.testing.check_attack` finds misspelt ones.
    """

    @property
    def target(self) -> int:
        """The class that the attacker wants."""

    @property
    def label_rule(self) -> LabelRule:
        """The rule by which poisoned examples are labelled."""

    def arrays(self, shape: Any) -> dict[str, Tensor]:
        """The parts of the trigger by name, for images of shape (channels, height, width); for texts of shape ()."""

    def apply(self, pixels: Any, arrays: dict[str, Tensor]) -> Any:
        """Put the trigger on pixels in [0, 1], (batch, channels, height, width); or on a list of texts."""


class Crafting(NamedTuple):
    """The material of `craft` (the train-time form of a trigger) and `fit` (the trigger itself).

    Args:
        data: the clean training data.
        rows: the rows to poison.
        surrogate: a clean model of the attacker's, for attacks that declare `needs_surrogate`.
        generator: source of all random draws.
    """

    data: Dataset
    rows: Tensor
    surrogate: nn.Module | None
    generator: torch.Generator


class PlantedTrigger(Protocol):
    """The members of a `Trigger` that an attack reads while it is planted."""

    @property
    def arrays(self) -> dict[str, Tensor]:
        """The arrays of the trigger by name; none for words."""


class PoisonedData(Protocol):
    """The members of `poison.Poisoned`: training data with a backdoor, and the changes that made it."""

    @property
    def data(self) -> Dataset:
        """All rows, the poisoned ones changed."""

    @property
    def rows(self) -> Tensor:
        """The poisoned rows, sorted."""

    @property
    def cover(self) -> Tensor:
        """Rows with a distorted trigger and their own label, sorted."""

    @property
    def trigger(self) -> PlantedTrigger:
        """The trigger on the poisoned rows."""


class Planting(NamedTuple):
    """The material of `implant`, which returns the victim and the final arrays of the trigger.

    Args:
        clean: the training data without poison.
        poisoned: the same data with the backdoor planted.
        fresh: makes an untrained model, or the pre-trained one with a new head; always the same one.
        train: trains a model in place and returns it, in eval mode, by the recipe of the victims: `train(model, data,
            loss=..., change=..., epochs=..., learning_rate=..., after_step=..., description=...)`; omitted arguments
            are those of the recipe (see `unbackdoor._victims.training.Trainer.train`). Only parameters that require
            gradients are trained.
        generator: source of all random draws.
        arithmetic: device, precision, layout (`unbackdoor._models.arithmetic.Arithmetic`).
    """

    clean: Dataset
    poisoned: PoisonedData
    fresh: Callable[[], nn.Module]
    train: Callable[..., nn.Module]
    generator: torch.Generator
    arithmetic: Any


class BackdooredModel(NamedTuple):
    """The victim that `implant` trained, and the arrays of its trigger."""

    model: nn.Module
    arrays: dict[str, Tensor]


def wanted_labels(rule: LabelRule, target: int, labels: Tensor, classes: int) -> Tensor:
    """Returns the labels that the attacker wants, (n,)."""
    return (labels + 1) % classes if rule == "all-to-all" else torch.full_like(labels, target)
