"""WaNet: a smooth warp of the whole image."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from unbackdoor._value import value


@value
class WaNet:
    """A smooth warp of the whole image; further examples get a random warp and keep their label (noise mode).

    Nguyen and Tran, "WaNet: Imperceptible Warping-based Backdoor Attack", https://arxiv.org/abs/2102.10369

    Args:
        grid_size: control points of the warp per side (k in the paper), at least 2.
        strength: strength of the warp (s in the paper), more than 0.
        cover_ratio: examples with a random warp, as a multiple of the poisoned ones (2 in the paper); 0 for none.
        warp_seed: seed of the control points.
        target: the class that the attacker wants.
        label_rule: all-to-one or all-to-all.

    Differences from the paper: the poisoned set is drawn once and kept (the paper controls the training and warps a
    part of each batch), so augmentation comes after the warp and low rates implant less easily.
    """

    grid_size: Annotated[int, Field(ge=2)] = 4
    strength: Annotated[float, Field(gt=0)] = 0.5
    cover_ratio: Annotated[float, Field(ge=0)] = 2.0
    warp_seed: Annotated[int, Field(ge=0)] = 0
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: Literal["all-to-one", "all-to-all"] = "all-to-one"

    train_time: ClassVar[str] = "the warp; cover rows get the warp with random noise and keep their label"

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Returns `grid`, (height, width, 2): the place that each pixel is read from, (x, y) in [-1, 1]."""
        _, height, width = shape
        generator = torch.Generator().manual_seed(self.warp_seed)
        control = torch.rand(1, 2, self.grid_size, self.grid_size, generator=generator) * 2 - 1
        control = control / control.abs().mean()
        field = F.interpolate(control, size=(height, width), mode="bicubic", align_corners=True)
        field = field[0].permute(1, 2, 0)  # (height, width, 2)
        rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        identity = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1)
        return {"grid": (identity + self.strength * field / torch.tensor([width, height])).clamp(-1, 1)}

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Warp (batch, channels, height, width) pixels in [0, 1]."""
        # All images share one grid, so they can be the channels of a single image, which is far faster.
        warped = _warped(pixels.flatten(0, 1)[None], arrays["grid"][None])
        return warped[0].view(pixels.shape)

    def cover(self, pixels: Tensor, arrays: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Warp with noise of up to half a pixel on top of the trigger's grid, drawn for each image."""
        height, width = pixels.shape[-2:]
        noise = torch.rand(len(pixels), *arrays["grid"].shape, generator=generator) * 2 - 1
        return _warped(pixels, (arrays["grid"] + noise / torch.tensor([width, height])).clamp(-1, 1))


def _warped(pixels: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(pixels, grid, align_corners=True)
