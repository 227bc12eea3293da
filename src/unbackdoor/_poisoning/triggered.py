"""Triggered test data: the examples that count as attacked, and the answers that the attacker wants."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._poisoning.abilities import sources_of
from unbackdoor._poisoning.attack import Attack, LabelRule, wanted_labels
from unbackdoor._poisoning.check import check
from unbackdoor._poisoning.trigger import Trigger, warn_of_cut_triggers


class Triggered(NamedTuple):
    """Test data with the trigger, only of classes that the attack is meant to move.

    Args:
        data: triggered items with their true labels.
        wanted: the class that the attacker wants for each, (n,).
        label_rule: label rule of the attack.
        target: target of the attack; None for all-to-all.
    """

    data: Dataset
    wanted: Tensor
    label_rule: LabelRule
    target: int | None


def triggered(data: Dataset, trigger: Trigger, classes: int) -> Triggered:
    """Put the trigger on the test examples that the attack is meant to move.

    Raises:
        UnbackdoorError: the trigger does not fit the images, or there is nothing to move.
    """
    attack = trigger.attack
    moved = movable(data, attack, classes)
    if data.modality in ("images", "image-text"):
        _check_fits(trigger, data)
    shown = replace(moved.data, items=trigger.stamp(moved.data.items))
    if data.modality == "text":
        warn_of_cut_triggers(moved.data, shown, attack, "they count as attacked")
    return moved._replace(data=shown)


def movable(data: Dataset, attack: Attack, classes: int) -> Triggered:
    """Returns the test examples that the attack is meant to move, without the trigger, and the wanted classes.

    Raises:
        UnbackdoorError: the attack does not fit the classes, or there is nothing to move.
    """
    check(attack, classes, data)
    return _moved(data, attack.label_rule, attack.target, classes, sources_of(attack))


def already_triggered(data: Dataset, target: int, classes: int, label_rule: LabelRule = "all-to-one") -> Triggered:
    """Returns test data that already carries a trigger, with true labels and without rows of the target class."""
    if not 0 <= target < classes:
        raise UnbackdoorError(f"`target` must be 0 to {classes - 1}, got {target}.")
    return _moved(data, label_rule, target, classes)


def _moved(data: Dataset, label_rule: LabelRule, target: int, classes: int, sources: tuple[int, ...] = ()) -> Triggered:
    """Returns the examples that an attack is meant to move, and the classes that it moves them to.

    These are the examples of the source classes if there are any, else all except the target's, or all (all-to-all).
    """
    goal = None if label_rule == "all-to-all" else target
    if sources:
        moved = data.select(torch.nonzero(torch.isin(data.labels, torch.tensor(sources))).flatten())
        if len(moved) == 0:
            raise UnbackdoorError(
                f"{data.name} has no example of the attack's source classes ({', '.join(map(str, sources))}), so "
                "nothing can be attacked. Add some."
            )
    else:
        moved = data if goal is None else data.select(torch.nonzero(data.labels != goal).flatten())
    if len(moved) == 0:
        raise UnbackdoorError(
            f"{data.name} has no example outside the target class {target}, so nothing can be attacked. Its labels "
            "must be the true ones, not the attacker's."
        )
    return Triggered(moved, wanted_labels(label_rule, target, moved.labels, classes), label_rule, goal)


def _check_fits(trigger: Trigger, data: Dataset) -> None:
    """Refuse arrays that were made for images of another shape, or that do not belong to the attack's fields."""
    blank = torch.zeros(1, *data.shape)
    try:
        shape = trigger.attack.apply(blank, trigger.arrays).shape
    except UnbackdoorError:  # the attack itself gives the reason
        raise
    except Exception:  # tensors that do not fit each other, or are absent
        shape = None
    if shape != blank.shape:
        raise UnbackdoorError(
            f"The trigger of {type(trigger.attack).__name__} does not fit the images of {data.name}, which are "
            f"{'x'.join(map(str, data.shape))}. Score on images of the shape that the attack was made for."
        )
