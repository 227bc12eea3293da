"""Rows that two data sets share."""

import logging

import torch

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError

logger = logging.getLogger("unbackdoor")


def without(test: Dataset, clean: Dataset) -> Dataset:
    """Returns the test examples that are not among the clean ones, so that no method is scored on its own examples."""
    sought, known = test, clean
    if getattr(test.encode, "done", False) != getattr(clean.encode, "done", False):  # one had pictures of several sizes
        sought, known = test.brought(), clean.brought()
    if sought.shape != known.shape:
        return test
    seen = set(known.identities())
    fresh = [row for row, identity in enumerate(sought.identities()) if identity not in seen]
    if len(fresh) == len(test):
        return test
    if not fresh:
        raise UnbackdoorError(
            f"{test.name} holds only examples of {clean.name}; scores need others. Give another `test`."
        )
    logger.info("%s: %s examples are also in %s; they are not scored.", test.name, len(test) - len(fresh), clean.name)
    return test.select(torch.tensor(fresh))
