"""The classes of a data set compared with those of a model: range, names, order."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.labels import check_range, matched
from unbackdoor._errors import printable

logger = logging.getLogger("unbackdoor")


def check_labels(data: Dataset, classes: int) -> None:
    """Refuse a label that the model's head does not have."""
    check_range(
        data.labels.tolist(), classes, data.name, "the model has", None if data.rows is None else data.rows.tolist()
    )


def in_order_of(data: Dataset, classes: Sequence[str] | None) -> Dataset:
    """Returns the same examples with a model's class numbers, matched by name if the data names its classes.

    Raises:
        UnbackdoorError: the model does not know a class of the data.
    """
    if classes is None or data.classes is None or data.classes == tuple(classes):
        return data
    named = {number: data.classes[number] for number in data.labels.unique().tolist() if number < len(data.classes)}
    meaning = matched({name: number for number, name in named.items()}, classes, data.name)
    number_of = {number: meaning[name] for number, name in named.items()}
    labels = [number_of.get(number, number) for number in data.labels.tolist()]
    return replace(data, labels=torch.tensor(labels, device=data.labels.device), classes=tuple(classes))


def report_class_order(
    data: Dataset, known: Sequence[str] | None, classes: int, warn: Callable[[str], None] = logger.warning
) -> None:
    """Log how the data's class names were numbered for a model that does not name its classes, and warn if in doubt.

    Args:
        data: examples, with or without class names.
        known: the names of the model's classes; if there are any, nothing is logged.
        classes: number of classes of the model.
        warn: a function that takes the warning.
    """
    if known is not None or data.classes is None or data.classes == tuple(map(str, range(len(data.classes)))):
        return
    some = ", ".join(f"{printable(name)} = {number}" for number, name in enumerate(data.classes[:3]))
    if len(data.classes) != classes:
        warn(
            f"{data.name} has {len(data.classes)} class names, but the model has {classes} classes without names. They "
            f"were numbered in order ({some}, ...), which is right only if the model was trained that way; labels as "
            "numbers are safe."
        )
        return
    more = ", ..." if len(data.classes) > 3 else ""
    logger.info(
        "%s: the model does not name its classes, so those of the data are numbered in order: %s%s.",
        data.name,
        some,
        more,
    )
