"""Rows that two data sets share."""

import logging

import torch

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
