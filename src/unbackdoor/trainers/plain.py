"""Ordinary training."""

from typing import ClassVar

from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._registry.entries import Modality
from unbackdoor._robust_training.run import TrainingRun
from unbackdoor._value import value


@value
class Plain:
    """Train on all rows by the recipe, as victims are trained: the control of every other trainer.

    Cannot see: any trigger. It trusts all rows, and distrusts none.

    Differences from the paper: there is none.
    """

    modality: ClassVar[tuple[Modality, ...]] = ("images", "text", "image-text")

    def __call__(self, data: Dataset, model: nn.Module, run: TrainingRun) -> nn.Module:
        """Train in place."""
        return run.train(model, data)
