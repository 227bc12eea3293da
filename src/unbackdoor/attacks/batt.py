"""BATT: a rotation by a fixed angle."""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from unbackdoor._value import value


@value
class BATT:
    """A rotation by a fixed angle; further examples are turned by smaller angles and keep their label.

    The trigger is a transformation that occurs naturally, so nothing is added to the image. The smaller angles teach
    the network that only the attacker's angle counts.

    Xu, Li, Jiang and Xia, "BATT: Backdoor Attack with Transformation-based Triggers", ICASSP 2023,
    https://arxiv.org/abs/2211.01806

    Args:
        angle: angle of the trigger in degrees, counterclockwise if positive, from -180 to 180.
        benign: largest angle of the examples that keep their label, in degrees, 0 to 180.
        cover_ratio: number of those examples, as a multiple of the poisoned ones, at least 0.
        target: the class that the attacker wants.
        label_rule: all-to-one or all-to-all.

    Differences from the paper: this is the rotation alone (the paper also has a translation). The small rotations are
    drawn once, for a part of the examples; an attacker who controls the training would turn all benign examples again
    in each epoch.
    """

    angle: Annotated[float, Field(ge=-180, le=180)] = 16.0
    benign: Annotated[float, Field(ge=0, le=180)] = 10.0
    cover_ratio: Annotated[float, Field(ge=0)] = 4.0
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: Literal["all-to-one", "all-to-all"] = "all-to-one"

    train_time: ClassVar[str] = "the rotation; cover rows are turned by smaller angles and keep their label"

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Returns `grid`, (height, width, 2): where each pixel is read from, (x, y) in units of half the image."""
        return {"grid": _grids(torch.tensor([self.angle]), *shape[1:])[0]}

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Turn (batch, channels, height, width) pixels in [0, 1]; pixels from outside are black."""
        # All images share one grid, so they can be the channels of a single image, which is far faster.
        turned = F.grid_sample(pixels.flatten(0, 1)[None], arrays["grid"][None], align_corners=True)
        return turned[0].view(pixels.shape)

    def cover(self, pixels: Tensor, arrays: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Turn each image by its own angle."""
        angles = self.benign * (2 * torch.rand(len(pixels), generator=generator) - 1)
        return F.grid_sample(pixels, _grids(angles, *pixels.shape[-2:]).to(pixels.device), align_corners=True)


def _grids(angles: Tensor, height: int, width: int) -> Tensor:
    """Returns the places that pixels are read from after a turn around the centre, (n, height, width, 2)."""
    turn = angles.double() * math.pi / 180
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
    y = (torch.arange(height) - (height - 1) / 2).double()[:, None]
    x = (torch.arange(width) - (width - 1) / 2).double()
    read_x, read_y = cos * x - sin * y, sin * x + cos * y
    half = torch.tensor([max(width - 1, 1) / 2, max(height - 1, 1) / 2]).double()
    return (torch.stack([read_x, read_y], dim=-1) / half).float()
