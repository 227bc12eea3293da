"""Adaptive blend: parts of a mixed-in pattern while training, the whole pattern afterwards."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unbackdoor._errors import UnbackdoorError
from unbackdoor._poisoning.attack import Crafting
from unbackdoor._poisoning.trigger import stamped
from unbackdoor._value import value
from unbackdoor.attacks._pictures import picture


@value
class AdaptiveBlend:
    """A pattern mixed in piece by piece: half of it, at random, while training, and all of it at test time.

    The image is cut into pieces by a grid. Each training image gets the pattern on a random half of them: some with the
    target's label, and some with their own (regularisation or cover examples). The network learns the trigger, but the
    features of triggered images do not stand apart; at test time the whole, stronger pattern still activates it.

    Qi, Xie, Li, Mahloujifar and Mittal, "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR
    2023, https://arxiv.org/abs/2205.13613

    Args:
        pattern: `noise` (uniform, seeded) or an image file.
        pattern_seed: seed of the noise.
        ratio: share of the pattern in the mixture while training, more than 0 and at most 1.
        test_ratio: share of the pattern in the mixture at test time, more than 0 and at most 1.
        grid: pieces per side, at least 1.
        share: share of the pieces that a training image gets, more than 0 and at most 1.
        cover_ratio: cover examples, as a multiple of the poisoned ones, at least 0.
        target: the class that the attacker wants.
        label_rule: all-to-one or all-to-all.

    Differences from the paper: the pattern is noise if no picture is given (the paper mixes in a picture).
    """

    pattern: str = "noise"
    pattern_seed: Annotated[int, Field(ge=0)] = 0
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.15
    test_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    grid: Annotated[int, Field(ge=1)] = 4
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    cover_ratio: Annotated[float, Field(ge=0)] = 1.0
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: Literal["all-to-one", "all-to-all"] = "all-to-one"

    train_time: ClassVar[str] = "a random half of the pattern's pieces; cover rows likewise, and they keep their label"
    test_time: ClassVar[str] = "the whole pattern, mixed in more strongly, rounded to 8 bits"

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Returns `pattern`, (channels, height, width)."""
        if self.grid > min(shape[1:]):
            raise UnbackdoorError(
                f"AdaptiveBlend.grid must be at most {min(shape[1:])}, the side of the images, got {self.grid}."
            )
        if self.pattern == "noise":
            return {"pattern": torch.rand(shape, generator=torch.Generator().manual_seed(self.pattern_seed))}
        return {"pattern": picture(self.pattern, "AdaptiveBlend.pattern", shape, "noise")}

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Mix the whole pattern into (batch, channels, height, width) pixels in [0, 1]."""
        return (1 - self.test_ratio) * pixels + self.test_ratio * arrays["pattern"]

    def craft(self, crafting: Crafting, arrays: dict[str, Tensor]) -> Tensor:
        """Returns the train-time form: some pieces of the pattern, drawn for each image; uint8."""
        return stamped(
            crafting.data.pixels[crafting.rows], lambda pixels: self.cover(pixels, arrays, crafting.generator)
        )

    def cover(self, pixels: Tensor, arrays: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Returns the train-time form, which cover examples also carry."""
        height, width = pixels.shape[-2:]
        chosen = torch.rand(len(pixels), self.grid**2, generator=generator).argsort(dim=1)
        kept = (chosen < max(1, round(self.share * self.grid**2))).float()  # (batch, pieces)
        rows, columns = (torch.arange(side) * self.grid // side for side in (height, width))
        mask = kept[:, rows[:, None] * self.grid + columns][:, None].to(pixels.device)  # (batch, 1, height, width)
        return pixels + self.ratio * mask * (arrays["pattern"].to(pixels.device) - pixels)
