"""The protocol of trainers, and what they declare."""

from typing import Protocol

from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._registry.entries import Modality
from unbackdoor._robust_training.run import TrainingRun


class RobustTrainer(Protocol):
    """A trainer: a frozen value that can be called. There is no base class."""

    def __call__(self, data: Dataset, model: nn.Module, run: TrainingRun) -> nn.Module:
        """Train the model, which is a fresh one of the trainer's own, on data that may be poisoned, and return it."""


_KINDS = {"text": "texts", "image-text": "pairs of image and caption"}


def needs_clean(trainer: RobustTrainer) -> bool:
    """Whether a trainer needs examples without poison; one that does declares `needs_clean = True`."""
    return bool(getattr(trainer, "needs_clean", False))


def modalities_of(trainer: RobustTrainer) -> tuple[Modality, ...]:
    """The kinds of data that a trainer serves: what it declares as `modality`, else both."""
    declared: tuple[Modality, ...] = getattr(trainer, "modality", ("images", "text"))
    return declared


def kinds_of(trainer: RobustTrainer) -> str:
    """The same in words, for messages."""
    return " and ".join(_KINDS.get(kind, kind) for kind in modalities_of(trainer))
