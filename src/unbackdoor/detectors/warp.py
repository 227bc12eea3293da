"""Warp: the smallest affine map and smooth flow that move examples to each class."""

from typing import Annotated

from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.finding import Finding
from unbackdoor._inversion.smallest import SmallestSearch
from unbackdoor._inversion.warps import Warps
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.detectors._smallest import smallest_of_each_class


@value
class Warp:
    """Search the smallest warp w for each class t, such that a picture whose pixels are read from w is classified as t.

        min CE(f(x(w)), t) + cost |w - identity|

    A warp is an affine map (a shift, a turn, a scale) plus a smooth flow between control points. Its size is the root
    mean square of the distances that it moves pixels. A class whose warp is far smaller than those of the others has a
    shortcut that a turn or a bend of the picture opens.

    The form of the flow is that of Nguyen and Tran, "WaNet: Imperceptible Warping-based Backdoor Attack", ICLR 2021,
    https://arxiv.org/abs/2102.10369; the search is that of Neural Cleanse, https://doi.org/10.1109/SP.2019.00031.

    Cannot see: triggers that change the values of pixels (patches, patterns), flows finer than the control points,
    triggers that differ between pictures, triggers of several target classes at once, and shortcuts from one class
    only.

    Args:
        control_points: control points of the flow, per side, at least 2.
        steps: steps of the search, at least 1; each sees one batch for every class.
        batch_size: examples per step and class, at least 2.
        cost: weight of a warp's size at first, per pixel, more than 0.
        success: share of a batch that a trigger must move to its class, more than 0 and at most 1.
        patience: steps in a row before a class's weight changes, at least 1.
        learning_rate: learning rate of Adam, in pixels per step, more than 0.

    Differences from the paper: there is none on this search. The logarithms of the sizes are compared, leaving out one
    class in turn, and the result is calibrated on clean models.
    """

    control_points: Annotated[int, Field(ge=2)] = 4
    steps: Annotated[int, Field(ge=1)] = 60
    batch_size: Annotated[int, Field(ge=2)] = 20
    cost: Annotated[float, Field(gt=0)] = 0.1
    success: Annotated[float, Field(gt=0, le=1)] = 0.9
    patience: Annotated[int, Field(ge=1)] = 5
    learning_rate: Annotated[float, Field(gt=0)] = 0.3

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> Finding:
        """Search all classes."""
        family = Warps.smooth(clean.shape, self.control_points)
        search = SmallestSearch.of(self, family, learning_rate=self.learning_rate)
        return smallest_of_each_class(search, model, clean, run)
