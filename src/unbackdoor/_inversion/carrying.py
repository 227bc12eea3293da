"""Who carries a reversed trigger: pixels before they are encoded, embeddings, a share of each batch.

Masks, patterns and perturbations of images live on pixels in [0, 1] at the data set's own size; the model's own
preprocessing comes after them, and gradients flow through it.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from unbackdoor._data.augmentation import Augmentation
from unbackdoor._data.dataset import Dataset
from unbackdoor._data.images import ImageEncoder
from unbackdoor._data.texts import Tokens
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import Inputs, logits
from unbackdoor._models.perturbation import perturbed_logits
from unbackdoor._purification.run import Run

Reversed = Callable[[Tensor], Tensor]
"""A reversed trigger: from clean to triggered.

Of images: pixels in [0, 1], (batch, channels, height, width). Of texts: the output of the embedding layer, (batch,
length, width).
"""


def needs_pixels(owner: object, clean: Dataset) -> None:
    """Refuse texts, for a method that looks for its trigger among pixels."""
    if clean.modality != "images":
        raise UnbackdoorError(
            f"{type(owner).__name__} looks for a trigger among pixels, but {clean.name} holds {clean.modality}. Try "
            "pam, which on texts looks among embeddings."
        )


def in_pixels(clean: Dataset, *, augmented: bool = True) -> Dataset:
    """The same images, whose batches hold pixels in [0, 1] in place of the model's inputs; texts as they are."""
    if clean.modality != "images":
        return clean
    augment = clean.augment if augmented else Augmentation.none()
    return replace(clean, encode=ImageEncoder(), augment=augment)


def encoded(clean: Dataset, pixels: Tensor, run: Run) -> Inputs:
    """Pixels in [0, 1] as the model takes them."""
    assert isinstance(clean.encode, ImageEncoder)
    return run.arithmetic.lay(clean.encode(255 * pixels))


def carriers(count: int, share: float) -> Tensor:
    """Which of `count` examples carry the trigger: int(share * count + 1) of them, evenly spread.

    Spread, since batches of texts are sorted by length.

    >>> carriers(10, 0.2).tolist()
    [0, 3, 6]
    """
    carrying = min(int(share * count + 1), count)
    return torch.arange(carrying) * count // carrying


class Carrying(nn.Module):
    """A model that puts a reversed trigger on a share of each batch, for `run.tune` and `descend`.

    Args:
        model: what is tuned.
        clean: whose encoder the model's inputs come from.
        run: of the purification.
        reversed_trigger: put on before encoding; on texts, onto the embeddings.
        share: of each batch, see `carriers`.
    """

    def __init__(self, model: nn.Module, clean: Dataset, run: Run, reversed_trigger: Reversed, share: float) -> None:
        super().__init__()
        self.model, self.clean, self.run = model, clean, run
        self.reversed_trigger, self.share = reversed_trigger, share

    def forward(self, pixels: Tensor | None = None, **tokens: Tensor) -> Tensor:
        """Class scores of pixels as `in_pixels` hands them out, or of tokens."""
        if pixels is None:
            return self._of_text(Tokens(tokens))
        rows = carriers(len(pixels), self.share).to(pixels.device)
        with torch.no_grad():
            pixels = pixels.index_copy(0, rows, self.reversed_trigger(pixels[rows]).to(pixels.dtype))
        return logits(self.model, encoded(self.clean, pixels, self.run))

    def _of_text(self, tokens: Tokens) -> Tensor:
        rows = carriers(len(tokens), self.share)
        shift = self.reversed_trigger(torch.zeros((), device=tokens["input_ids"].device))  # (1, 1, width)
        mask = shift.new_zeros(len(tokens), 1, 1)
        mask[rows] = 1
        return perturbed_logits(self.model, tokens, mask * shift)
