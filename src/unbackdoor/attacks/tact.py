"""TaCT: a patch that works on some classes only."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unbackdoor._value import value
from unbackdoor.attacks._patches import PatchPlace, patch, patched


@value
class TaCT:
    """A patch that moves images of the source classes only; cover examples of other classes keep their label.

    Because of the cover examples the trigger alone does not lead to the target: the network must use trigger and class
    together, so triggered features do not stand apart from those of the target class.

    Tang, Wang, Tang and Zhang, "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination
    Detection", USENIX Security 2021, https://arxiv.org/abs/1908.00686

    Args:
        sources: the classes that the attacker moves, at least one, and not the target.
        cover_classes: classes that carry the trigger and keep their label; if empty, all that are neither source nor
            target.
        cover_ratio: cover examples, as a multiple of the poisoned ones, at least 0.
        pattern: `checkerboard` (black and white pixels), `solid` (white), or an image file.
        size: side of the patch in pixels, at least 1.
        place: place of the patch in the image.
        margin: pixels between the patch and the border, at least 0.
        target: the class that the attacker wants.
        label_rule: all-to-one.

    Differences from the paper: its triggers are pictures of patches; here the patch is the one of `badnets`. The rate
    counts the poisoned examples alone, over all training examples.
    """

    sources: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)
    cover_classes: tuple[int, ...] = ()
    cover_ratio: Annotated[float, Field(ge=0)] = 1.0
    pattern: str = "checkerboard"
    size: Annotated[int, Field(ge=1)] = 3
    place: PatchPlace = "bottom-right"
    margin: Annotated[int, Field(ge=0)] = 1
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: Literal["all-to-one"] = "all-to-one"

    train_time: ClassVar[str] = "the patch on images of the source classes; cover rows get it and keep their label"
    test_time: ClassVar[str] = "the patch on images of the source classes, rounded to 8 bits"

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Returns `patch`, (channels, size, size)."""
        return {"patch": patch(self.pattern, self.size, self.margin, shape, "TaCT")}

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Set the patch on (batch, channels, height, width) pixels in [0, 1]."""
        return patched(pixels, arrays["patch"], self.place, self.margin)

    def cover(self, pixels: Tensor, arrays: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Set the same patch: cover examples differ only by their class."""
        return self.apply(pixels, arrays)
