"""Pairs of an image and its caption: the items of a model of images and texts."""

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbackdoor._data.augmentation import Augmentation
from unbackdoor._data.images import Images
from unbackdoor._data.texts import Texts


@dataclass(frozen=True, eq=False)
class ImageCaptionPairs:
    """Images and their captions.

    Args:
        images: n images.
        captions: n single texts.
    """

    images: Images
    captions: Texts

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def shape(self) -> torch.Size:
        """(n, channels, height, width), of the images."""
        return self.images.shape

    def __getitem__(self, rows: Tensor | slice) -> "ImageCaptionPairs":
        """Some of the pairs, in the order of `rows` (row numbers or a mask)."""
        return ImageCaptionPairs(self.images[rows], self.captions[rows])

    def joined(self, others: "ImageCaptionPairs") -> "ImageCaptionPairs":
        """These pairs, then the others; their captions are not tokenised yet."""
        return ImageCaptionPairs(self.images.joined(others.images), self.captions.joined(others.captions))

    def replaced(self, rows: Tensor, others: "ImageCaptionPairs") -> "ImageCaptionPairs":
        """These pairs, with others in some rows; the captions are not tokenised yet."""
        return ImageCaptionPairs(
            self.images.replaced(rows, others.images), self.captions.replaced(rows, others.captions)
        )

    def identities(self) -> list[Hashable]:
        """The bytes of each image with its caption."""
        return list(zip(self.images.identities(), self.captions.identities(), strict=True))

    def on(self, device: torch.device | str) -> "ImageCaptionPairs":
        """The same pairs on another device."""
        return ImageCaptionPairs(self.images.on(device), self.captions.on(device))

    def augmented(self, augment: Augmentation, generator: torch.Generator) -> "ImageCaptionPairs":
        """The same pairs with augmented images; `generator` is on the CPU."""
        return replace(self, images=self.images.augmented(augment, generator))

    def order(self, size: int, generator: torch.Generator | None) -> Tensor:
        """Returns the row numbers in order, or shuffled if a generator is given; see `Items`."""
        return self.images.order(size, generator)
