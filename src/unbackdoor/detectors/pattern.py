"""Pattern: the smallest pattern over the whole picture that moves examples to each class."""

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
class Pattern:
    """Search the smallest pattern d for each class t, such that x + d is classified as t.

        min CE(f(clamp(x + d)), t) + cost |d|

    The size |d| is the root mean square over the pixels, in grey levels of 255. A class whose pattern is far smaller
    than those of the others has a shortcut that a faint change of the whole picture opens.

    Xiang, Miller and Kesidis, "Detection of Backdoors in Trained Classifiers Without Access to the Training Set", IEEE
    TNNLS 2022, https://arxiv.org/abs/1908.10498

    Cannot see: patches that are small and strong, warps, triggers that differ between pictures, triggers of several
    target classes at once (they hide each other), and shortcuts from one class only.

    Args:
        steps: steps of the search, at least 1; each sees one batch for every class.
        batch_size: examples per step and class, at least 2.
        cost: weight of a pattern's size at first, per grey level, more than 0.
        success: share of a batch that a trigger must move to its class, more than 0 and at most 1.
        patience: steps in a row before a class's weight changes, at least 1.
        learning_rate: learning rate of Adam, in shares of the range of pixels, more than 0.

    Differences from the paper: one pattern for each target class, not for each pair of classes; the weight of the size
    follows the rule of Neural Cleanse; the logarithms of the sizes are compared, leaving out one class in turn, and the
    result is calibrated on clean models.
    """

    steps: Annotated[int, Field(ge=1)] = 60
    batch_size: Annotated[int, Field(ge=2)] = 20
    cost: Annotated[float, Field(gt=0)] = 0.01
    success: Annotated[float, Field(gt=0, le=1)] = 0.9
    patience: Annotated[int, Field(ge=1)] = 5
    learning_rate: Annotated[float, Field(gt=0)] = 0.02

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> Finding:
        """Search all classes."""
        family = AdditivePattern.free(clean.shape)
        search = SmallestSearch.of(self, family, learning_rate=self.learning_rate)
        return smallest_of_each_class(search, model, clean, run)
