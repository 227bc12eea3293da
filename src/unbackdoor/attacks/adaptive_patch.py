"""Adaptive patch: one of several faint patches while training, all of them opaque afterwards."""

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unbackdoor._errors import UnbackdoorError
from unbackdoor._poisoning.attack import Crafting
from unbackdoor._poisoning.trigger import stamped
from unbackdoor._value import value

PATCHES = 4  # one per corner


@value
class AdaptivePatch:
    """Four patches, one per corner: a single faint one on each training image, all four at test time.

    Some training images get the target's label with their patch, others keep their own (regularisation or cover
    examples), so that no single patch suffices and the features of triggered images do not stand apart. The four
    together, opaque, do suffice.

    Qi, Xie, Li, Mahloujifar and Mittal, "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR
    2023, https://arxiv.org/abs/2205.13613

    Args:
        size: side of each patch in pixels, at least 1.
        opacity: opacity of the patch while training, more than 0 and at most 1.
        test_opacity: opacity of the patches at test time, more than 0 and at most 1.
        pattern_seed: seed of the colours of the patches.
        cover_ratio: cover examples, as a multiple of the poisoned ones, at least 0.
        target: the class that the attacker wants.
        label_rule: all-to-one or all-to-all.

    Differences from the paper: the patches are random black, white and fully coloured pixels, all of one opacity (the
    paper has four pictures of different sizes, each with its own opacity, and shows some of them at test time).
    """

    size: Annotated[int, Field(ge=1)] = 4
    opacity: Annotated[float, Field(gt=0, le=1)] = 0.5
    test_opacity: Annotated[float, Field(gt=0, le=1)] = 1.0
    pattern_seed: Annotated[int, Field(ge=0)] = 0
    cover_ratio: Annotated[float, Field(ge=0)] = 2.0
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: Literal["all-to-one", "all-to-all"] = "all-to-one"

    train_time: ClassVar[str] = "one of the four patches, half transparent; cover rows likewise, with their own label"
    test_time: ClassVar[str] = "all four patches, opaque, rounded to 8 bits"

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Returns `patches`, (4, channels, size, size)."""
        channels, height, width = shape
        if 2 * self.size > min(height, width):
            raise UnbackdoorError(
                f"AdaptivePatch.size must be at most {min(height, width) // 2}, half the side of the images, got "
                f"{self.size}."
            )
        generator = torch.Generator().manual_seed(self.pattern_seed)
        return {"patches": torch.randint(2, (PATCHES, channels, self.size, self.size), generator=generator).float()}

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Set all patches on (batch, channels, height, width) pixels in [0, 1]."""
        pixels = pixels.clone()
        for number, patch in enumerate(arrays["patches"]):
            corner = _corner(number, patch.shape[-1])
            pixels[corner] = pixels[corner].lerp(patch, self.test_opacity)
        return pixels

    def craft(self, crafting: Crafting, arrays: dict[str, Tensor]) -> Tensor:
        """Returns the train-time form: one faint patch, drawn for each image; uint8."""
        return stamped(
            crafting.data.pixels[crafting.rows], lambda pixels: self.cover(pixels, arrays, crafting.generator)
        )

    def cover(self, pixels: Tensor, arrays: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Returns the train-time form, which cover examples also carry."""
        pixels = pixels.clone()
        drawn = torch.randint(PATCHES, (len(pixels),), generator=generator).to(pixels.device)
        for number, patch in enumerate(arrays["patches"].to(pixels.device)):
            corner = _corner(number, patch.shape[-1])
            opacity = self.opacity * (drawn == number).float()[:, None, None, None]
            pixels[corner] += opacity * (patch - pixels[corner])
        return pixels


def _corner(number: int, size: int) -> tuple[Any, ...]:
    """Returns the places of the patches: top left, top right, bottom left, bottom right."""
    first, last = slice(None, size), slice(-size, None)
    return (..., last if number // 2 else first, last if number % 2 else first)
