"""Inverted triggers: the result of a search, and the pixels that it works on.

Masks, patterns and perturbations of images live on pixels in [0, 1] at the data set's own size; the model's own
preprocessing comes after them, and gradients flow through it.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from unbackdoor._data.augmentation import Augmentation
from unbackdoor._data.dataset import Dataset
from unbackdoor._data.images import ImageEncoder
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import Inputs
from unbackdoor._purification.run import Run

InvertedTrigger = Callable[[Tensor], Tensor]
"""A function from clean to triggered.

For images: pixels in [0, 1], (batch, channels, height, width). For texts: the output of the embedding layer, (batch,
length, width).
"""

Inversion = Callable[[nn.Module, Dataset, Run, InvertedTrigger | None], InvertedTrigger]
"""A search for a trigger: a function of the model in its present state, clean examples, the run, and the trigger that
the round before found (None in the first round)."""


def refuse_texts(owner: object, clean: Dataset) -> None:
    """Refuse texts, for a method that looks for its trigger among pixels."""
    if clean.modality != "images":
        raise UnbackdoorError(
            f"{type(owner).__name__} searches pixels for a trigger, but {clean.name} holds {clean.modality}. Try "
            "pam, which searches embeddings on texts."
        )


def in_pixels(clean: Dataset, *, augmented: bool = True) -> Dataset:
    """The same images, in batches of pixels in [0, 1] instead of model inputs; texts are returned unchanged."""
    if clean.modality != "images":
        return clean
    augment = clean.augment if augmented else Augmentation.none()
    return replace(clean, encode=ImageEncoder(), augment=augment)


def size_for_model(encode: ImageEncoder, shape: tuple[int, ...]) -> tuple[int, int]:
    """The (height, width) at which a model gets pictures of some shape, (channels, height, width)."""
    return encode.target((shape[-2], shape[-1]))


def encoded(clean: Dataset, pixels: Tensor, run: Run) -> Inputs:
    """Returns the model inputs of pixels in [0, 1]."""
    return run.arithmetic.lay(clean.image_encoder(255 * pixels))
