"""Augmentation of images: random crops, mirror images and distortions, a whole batch at once."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger("unbackdoor")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crops and mirror images, for a whole batch at once and on its device.

    Args:
        padding: zeros put around the image before a crop of its own size, in pixels; 0 for no crop.
        flip: mirror half of the images.
        distort: change contrast by up to 30 %, brightness by up to 15 % and tint by up to 10 % of the range, and paint
            a square of up to half the side over every second image, in its mean grey level.
    """

    padding: int = 4
    flip: bool = True
    distort: bool = False

    @classmethod
    def none(cls) -> "Augmentation":
        """No augmentation."""
        return cls(padding=0, flip=False)

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Augment (batch, channels, height, width) pixels; `generator` lives on the CPU."""
        batch, _, height, width = pixels.shape
        if self.padding:
            offsets = torch.randint(0, 2 * self.padding + 1, (2, batch), generator=generator).to(pixels.device)
            padded = F.pad(pixels, (self.padding,) * 4)
            rows = offsets[0, :, None] + torch.arange(height, device=pixels.device)  # (batch, height)
            columns = offsets[1, :, None] + torch.arange(width, device=pixels.device)  # (batch, width)
            examples = torch.arange(batch, device=pixels.device)[:, None, None]
            # Indexed without the channels, which come out last: (batch, height, width, channels).
            pixels = padded.permute(0, 2, 3, 1)[examples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if self.flip:
            mirrored = (torch.rand(batch, generator=generator) < 0.5).to(pixels.device)
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        if self.distort:
            pixels = _erased(_jittered(pixels, generator), generator)
        return pixels


def _jittered(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Changes contrast, brightness and tint of each image; float, in [0, 255]."""
    batch, channels = pixels.shape[:2]
    contrast = 0.7 + 0.6 * torch.rand(batch, 1, 1, 1, generator=generator)
    tint = 0.2 * torch.rand(batch, channels, 1, 1, generator=generator) - 0.1
    brightness = 0.3 * torch.rand(batch, 1, 1, 1, generator=generator) - 0.15
    mean = pixels.float().mean(dim=(1, 2, 3), keepdim=True)
    shift = (255 * (tint + brightness)).to(pixels.device)
    return ((pixels - mean) * contrast.to(pixels.device) + mean + shift).clamp(0, 255)


def _erased(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Paints a square in every second image, of an eighth to half of the height, cut off at the border."""
    batch, _, height, width = pixels.shape
    side = torch.randint(height // 8, height // 2 + 1, (batch, 1), generator=generator)
    top = torch.randint(0, height, (batch, 1), generator=generator)
    left = torch.randint(0, width, (batch, 1), generator=generator)
    chosen = torch.rand(batch, 1, 1, generator=generator) < 0.5
    rows = 2 * (torch.arange(height) - top).abs() < side  # (batch, height)
    columns = 2 * (torch.arange(width) - left).abs() < side  # (batch, width)
    square = (rows[:, :, None] & columns[:, None, :] & chosen).to(pixels.device)
    return torch.where(square[:, None], pixels.mean(dim=(1, 2, 3), keepdim=True), pixels)


def augmentation(
    kind: Literal["auto", "flip", "crop", "none"], shape: tuple[int, ...], classes: Sequence[str] | None
) -> Augmentation:
    """Returns the augmentation of a data set.

    The padding of crops is 4 pixels, less for images under 32 pixels.

    Args:
        kind: `flip` means crops and mirror images, `crop` only crops. `auto` is `flip`, but `crop` if a class name
            shows that a mirror image may belong to another class, or to none: a digit or letter, left or right, a
            number on a sign.
        shape: shape of the pictures, (channels, height, width); () for texts, which are not augmented.
        classes: names of the classes, if they are known.
    """
    if kind == "none" or not shape:
        return Augmentation.none()
    flip = kind == "flip"
    if kind == "auto":
        handed = next((name for name in classes or () if _has_handedness(name)), None)
        flip = handed is None
        if handed is not None:
            logger.info("The class %r may look different in a mirror: no flips (`augment='flip'` does them).", handed)
    return Augmentation(padding=min(4, min(shape[-2:]) // 8), flip=flip)


def _has_handedness(name: str) -> bool:
    """Whether a class is a character or number as a whole, or its name has left, right or a number as a word.

    >>> [name for name in ("7", "seven", "turn left ahead", "speed limit 50", "3D printer") if _has_handedness(name)]
    ['7', 'seven', 'turn left ahead', 'speed limit 50']
    """
    words = re.findall(r"\w+", name.lower().replace("_", " "))
    digits = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
    alone = len(words) == 1 and (words[0] in digits or len(words[0]) == 1)
    return alone or any(word in ("left", "right") or word.isdecimal() for word in words)
