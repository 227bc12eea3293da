"""BadNets: a small patch at a fixed place."""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from unbackdoor._poisoning.attack import LabelRule
from unbackdoor._value import value
from unbackdoor.attacks._patches import PatchPlace, patch, patched


@value
class BadNets:
    """A small patch at a fixed place.

    Gu, Dolan-Gavitt and Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
    https://arxiv.org/abs/1708.06733

    Args:
        pattern: `checkerboard` (black and white pixels), `solid` (white), or an image file.
        size: side of the patch in pixels, at least 1.
        place: place of the patch in the image.
        margin: pixels between the patch and the border, at least 0.
        target: the class that the attacker wants.
        label_rule: all-to-one or all-to-all; clean-label is possible but rarely implants.

    Differences from the paper: the patch may be a checkerboard or a picture (the paper has single pixels and small
    patterns), and all triggers are rounded to 8 bits.
    """

    pattern: str = "checkerboard"
    size: Annotated[int, Field(ge=1)] = 3
    place: PatchPlace = "bottom-right"
    margin: Annotated[int, Field(ge=0)] = 1
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: LabelRule = "all-to-one"

    modality: ClassVar[tuple[str, ...]] = ("images", "image-text")

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Returns `patch`, (channels, size, size)."""
        return {"patch": patch(self.pattern, self.size, self.margin, shape, "BadNets")}

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Set the patch on (batch, channels, height, width) pixels in [0, 1]."""
        return patched(pixels, arrays["patch"], self.place, self.margin)
