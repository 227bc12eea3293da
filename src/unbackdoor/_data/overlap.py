"""Equal rows: those that two data sets share, and those of one."""

import hashlib
import logging
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError

logger = logging.getLogger("unbackdoor")


def without(test: Dataset, clean: Dataset) -> Dataset:
    """Returns the test examples that are not among the clean ones, so that no method is scored on its own examples."""
    fresh = others_than(test, clean)
    if len(fresh) == len(test):
        return test
    if len(fresh) == 0:
        raise UnbackdoorError(
            f"{test.name} holds only examples of {clean.name}; scores need others. Give another `test`."
        )
    logger.info("%s: %s examples are also in %s; they are not scored.", test.name, len(test) - len(fresh), clean.name)
    return fresh


def unseen(test: Dataset, training: Dataset) -> Dataset:
    """Returns the test examples that a model is not trained on; if there are none, all of them, with a warning."""
    if len(others_than(test, training)) > 0:
        return without(test, training)
    logger.warning(
        "%s holds only examples of %s, on which the model is trained: its scores say nothing about others.",
        *(test.name, training.name),
    )
    return test


def others_than(examples: Dataset, known: Dataset) -> Dataset:
    """Returns the examples that are not among known ones, in their order."""
    sought = examples
    if getattr(examples.encode, "done", False) != getattr(known.encode, "done", False):  # one had several sizes
        sought, known = examples.brought(), known.brought()
    if sought.shape != known.shape:
        return examples
    seen = set(known.identities())
    fresh = [row for row, identity in enumerate(sought.identities()) if identity not in seen]
    return examples if len(fresh) == len(examples) else examples.select(torch.tensor(fresh, dtype=torch.int64))


def distinct(data: Dataset, note: Callable[[str], None]) -> Dataset:
    """Returns the examples without those whose input an earlier one has, whatever their labels or answers.

    Args:
        data: the examples.
        note: takes a sentence on how many are left out.
    """
    first = _first_equal(data)
    if first is None:
        return data
    kept = data.select((first == torch.arange(len(data))).nonzero().flatten())
    what = {"images": "picture", "text": "text", "conversations": "prompt", "image-text": "picture"}[data.modality]
    note(
        f"{len(data) - len(kept):,} of the {len(data):,} rows of {data.name} have the {what} of an earlier one, and "
        "are left out: what is measured on held-out examples would not be unseen."
    )
    return kept


def split_apart(data: Dataset, count: int, *, seed: int) -> tuple[Dataset, Dataset]:
    """About `count` examples and the rest, as `Dataset.split` draws them, but with equal inputs of a class in one part.

    A class with one input alone is in the first part; if all classes are, they are split as `Dataset.split` does. Data
    with groups is split by these.

    Raises:
        UnbackdoorError: there are not enough examples.
    """
    first = None if data.groups is not None else _first_equal(data)
    if first is None or len(torch.stack([first, data.labels.cpu()]).unique(dim=1)[0]) == len(data.labels.unique()):
        return data.split(count, seed=seed)
    rest, part = replace(data, groups=first.to(data.labels.device)).split(len(data) - count, seed=seed)
    return replace(part, groups=None), replace(rest, groups=None)


def _first_equal(data: Dataset) -> Tensor | None:
    """Returns for each example the first one with the same input, (n,); None if all inputs differ.

    The input of a prompt is without its answer, that of a pair the picture.
    """
    seen: dict[Hashable, int] = {}
    first = [seen.setdefault(each, row) for row, each in enumerate(_inputs(data))]
    return None if len(seen) == len(data) else torch.tensor(first)


def _inputs(data: Dataset) -> list[Hashable]:
    """Returns something hashable and short for the input of each example, equal for equal inputs."""
    if data.modality == "conversations":
        return [entry.messages for entry in data.conversations.entries]
    if data.modality == "text":
        return data.identities()
    pictures = data.pictures.cpu()
    return [hashlib.sha256(picture.numpy().tobytes()).digest() for picture in pictures]
