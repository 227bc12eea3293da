"""Patch: the smallest mask and pattern that move examples to each class."""

from typing import Annotated

from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.finding import Finding
from unbackdoor._inversion.masks import MaskedPatch
from unbackdoor._inversion.smallest import SmallestSearch
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.detectors._smallest import smallest_of_each_class


@value
class Patch:
    """Search the smallest mask m and pattern p for each class t, such that (1 - m) x + m p is classified as t.

        min CE(f((1 - m) x + m p), t) + cost |m|_1

    A class whose mask is far smaller than those of the others has a shortcut that a small patch opens.

    Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019,
    https://doi.org/10.1109/SP.2019.00031

    Cannot see: triggers over the whole picture, warps, triggers that differ between pictures, triggers of several
    target classes at once (they hide each other), and shortcuts from one class only.

    Args:
        steps: steps of the search, at least 1; each sees one batch for every class.
        batch_size: examples per step and class, at least 2.
        cost: weight of a mask's size at first, more than 0.
        success: share of a batch that a trigger must move to its class, more than 0 and at most 1.
        patience: steps in a row before a class's weight changes, at least 1.

    Differences from the paper: all classes are searched at once. The rule "2 median absolute deviations below the
    median" raises false alarms on 10 to 33 % of clean models with ten classes, so it is not used: the logarithms of
    the sizes are compared, leaving out one class in turn, and the result is calibrated on clean models.
    """

    steps: Annotated[int, Field(ge=1)] = 100
    batch_size: Annotated[int, Field(ge=2)] = 32
    cost: Annotated[float, Field(gt=0)] = 1e-3
    success: Annotated[float, Field(gt=0, le=1)] = 0.98
    patience: Annotated[int, Field(ge=1)] = 5

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> Finding:
        """Search all classes."""
        family = MaskedPatch()
        search = SmallestSearch.of(self, family, learning_rate=0.1)
        return smallest_of_each_class(search, model, clean, run)
