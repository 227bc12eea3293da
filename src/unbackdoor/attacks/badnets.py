"""BadNets: a small patch at a fixed place."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from unbackdoor._attack import LabelRule
from unbackdoor._errors import UnbackdoorError
from unbackdoor._values import value
from unbackdoor.attacks._pictures import picture

Place = Literal["top-left", "top-right", "bottom-left", "bottom-right", "center"]


@value
class BadNets:
    """A small patch at a fixed place.

    Gu, Dolan-Gavitt and Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
    https://arxiv.org/abs/1708.06733

    Args:
        pattern: `checkerboard` (black and white pixels), `solid` (white), or an image file.
        size: side of the patch in pixels, at least 1.
        place: where the patch sits.
        margin: pixels between the patch and the border, at least 0.
        target: the class that the attacker wants.
        label_rule: all-to-one or all-to-all; clean-label is possible but rarely implants.

    Differences from the paper: the patch may be a checkerboard or a picture (the paper has single pixels and small
    patterns), and all triggers are rounded to 8 bits.
    """

    pattern: str = "checkerboard"
    size: Annotated[int, Field(ge=1)] = 3
    place: Place = "bottom-right"
    margin: Annotated[int, Field(ge=0)] = 1
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: LabelRule = "all-to-one"

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """`patch`, (channels, size, size)."""
        channels, height, width = shape
        if self.size + self.margin > min(height, width):
            raise UnbackdoorError(
                f"BadNets.size plus margin must be at most {min(height, width)}, the side of the images, got "
                f"{self.size} + {self.margin}."
            )
        if self.pattern == "solid":
            return {"patch": torch.ones(channels, self.size, self.size)}
        if self.pattern == "checkerboard":
            return {"patch": checkerboard(self.size).expand(channels, -1, -1).contiguous()}
        return {
            "patch": picture(self.pattern, "BadNets.pattern", (channels, self.size, self.size), "checkerboard, solid")
        }

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Set the patch on (batch, channels, height, width) pixels in [0, 1]."""
        height, width = pixels.shape[-2:]
        top = self.margin if self.place.startswith("top") else height - self.size - self.margin
        left = self.margin if self.place.endswith("left") else width - self.size - self.margin
        if self.place == "center":
            top, left = (height - self.size) // 2, (width - self.size) // 2
        pixels = pixels.clone()
        pixels[..., top : top + self.size, left : left + self.size] = arrays["patch"]
        return pixels


def checkerboard(size: int) -> Tensor:
    """Alternating 1 and 0, the corners 1 where the size is odd, (size, size)."""
    steps = torch.arange(size)
    return ((steps[:, None] + steps) % 2 == 0).float()
