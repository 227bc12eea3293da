"""LowFrequencyPattern: the smallest smooth pattern over the whole picture that moves examples to each class."""

from typing import Annotated

from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.finding import Finding
from unbackdoor._inversion.patterns import AdditivePattern
from unbackdoor._inversion.smallest import SmallestSearch
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.detectors._smallest import smallest_of_each_class


@value
class LowFrequencyPattern:
    """Search the smallest pattern of low frequency for each class: `Pattern`, but among sums of slow cosines.

    The cosines are those of the discrete cosine transform with the lowest frequencies. Few patterns are so smooth, so a
    clean model needs large ones; that is why a smooth trigger stands out here that is ordinary among free patterns.

    The idea that triggers may live among low frequencies: Zeng, Park, Mao and Jia, "Rethinking the Backdoor Attacks'
    Triggers: A Frequency Perspective", ICCV 2021, https://arxiv.org/abs/2104.03413

    Cannot see: fine patterns, patches, warps, triggers that differ between pictures, triggers of several target classes
    at once (they hide each other), and shortcuts from one class only.

    Args:
        share: share of the cosines along each side, from the lowest frequency, more than 0 and at most 1; at least one
            is taken.
        steps: steps of the search, at least 1; each sees one batch for every class.
        batch_size: examples per step and class, at least 2.
        cost: weight of a pattern's size at first, per grey level, more than 0.
        success: share of a batch that a trigger must move to its class, more than 0 and at most 1.
        patience: steps in a row before a class's weight changes, at least 1.
        learning_rate: learning rate of Adam, in shares of the range of pixels, more than 0.

    Differences from the paper: it makes such triggers and looks for their traces in data; the search is that of
    `Pattern`.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.25
    steps: Annotated[int, Field(ge=1)] = 60
    batch_size: Annotated[int, Field(ge=2)] = 20
    cost: Annotated[float, Field(gt=0)] = 0.01
    success: Annotated[float, Field(gt=0, le=1)] = 0.9
    patience: Annotated[int, Field(ge=1)] = 5
    learning_rate: Annotated[float, Field(gt=0)] = 0.02

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> Finding:
        """Search all classes."""
        family = AdditivePattern.of_low_frequency(clean.shape, self.share)
        search = SmallestSearch.of(self, family, learning_rate=self.learning_rate)
        return smallest_of_each_class(search, model, clean, run)
