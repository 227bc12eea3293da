"""Small patches at a fixed place, which several attacks use as triggers."""

from typing import Literal

import torch
from torch import Tensor

from unbackdoor._errors import UnbackdoorError
from unbackdoor.attacks._pictures import picture

PatchPlace = Literal["top-left", "top-right", "bottom-left", "bottom-right", "center"]


def patch(pattern: str, size: int, margin: int, shape: tuple[int, int, int], owner: str) -> Tensor:
    """Returns a patch for images of a shape, (channels, size, size), in [0, 1].

    Args:
        pattern: `checkerboard`, `solid` or an image file.
        size: side of the patch in pixels.
        margin: pixels between the patch and the border.
        shape: (channels, height, width) of the images.
        owner: name of the attack that has these fields, for messages.

    Raises:
        UnbackdoorError: the patch does not fit into the image, or the file is not a picture.
    """
    channels, height, width = shape
    if size + margin > min(height, width):
        raise UnbackdoorError(
            f"{owner}.size plus margin must be at most {min(height, width)}, the side of the images, got "
            f"{size} + {margin}."
        )
    if pattern == "solid":
        return torch.ones(channels, size, size)
    if pattern == "checkerboard":
        return checkerboard(size).expand(channels, -1, -1).contiguous()
    return picture(pattern, f"{owner}.pattern", (channels, size, size), "checkerboard, solid")


def patched(pixels: Tensor, patch: Tensor, place: PatchPlace, margin: int) -> Tensor:
    """Returns pixels (batch, channels, height, width) with the patch set on each image."""
    height, width = pixels.shape[-2:]
    size = patch.shape[-1]
    top = margin if place.startswith("top") else height - size - margin
    left = margin if place.endswith("left") else width - size - margin
    if place == "center":
        top, left = (height - size) // 2, (width - size) // 2
    pixels = pixels.clone()
    pixels[..., top : top + size, left : left + size] = patch
    return pixels


def checkerboard(size: int) -> Tensor:
    """Returns alternating 1 and 0, with 1 in the corners if the size is odd, (size, size)."""
    steps = torch.arange(size)
    return ((steps[:, None] + steps) % 2 == 0).float()
