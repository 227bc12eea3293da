"""Warps: affine maps and smooth flows that move the places of pixels; a family of triggers for the smallest search."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from unbackdoor._inversion.smallest import Kind

START = 0.1  # standard deviation of the weights that a search starts from, in pixels


@dataclass(frozen=True, eq=False)
class Warps:
    """Each pixel is read from another place; the size is the root mean square of the distances, in pixels.

    A `TriggerFamily`. Its parameters are displacements in pixels, (triggers, 2, height, width), x before y.

    Args:
        flows: displacements along one axis that are weighted and summed, (flows, height, width); see `flows`.
    """

    flows: Tensor

    kind: ClassVar[Kind] = "warp"

    @classmethod
    def smooth(cls, shape: tuple[int, ...], control_points: int) -> "Warps":
        """Affine maps and smooth flows of pictures.

        Args:
            shape: of a picture, (channels, height, width).
            control_points: of the flow, per side, at least 2.
        """
        _, height, width = shape
        return cls(flows(height, width, control_points))

    def start(self, classes: int, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Weights of the flows, normal, (classes, 2, flows)."""
        return START * torch.randn((classes, 2, len(self.flows)), generator=generator, dtype=dtype)

    def bounded(self, free: Tensor) -> Tensor:
        """The displacements of weights, (triggers, 2, height, width)."""
        return torch.einsum("taf,fhw->tahw", free, self.flows.to(free))

    def shrunk(self, free: Tensor, factor: float) -> Tensor:
        """Weights times a factor."""
        return factor * free

    def applied(self, parameters: Tensor, pixels: Tensor) -> Tensor:
        """Warped pixels, (triggers, batch, channels, height, width); beyond the border, those of the border."""
        # One grid for all pictures of a batch, so these can be the channels of a single one: far faster.
        stacked = pixels.flatten(0, 1).expand(len(parameters), -1, -1, -1)
        warped = F.grid_sample(stacked, grids(parameters), align_corners=True, padding_mode="border")
        return warped.view(len(parameters), *pixels.shape)

    def size(self, parameters: Tensor) -> Tensor:
        """The root mean square of each warp's distances, in pixels, (triggers,)."""
        # The tiny addend keeps the gradient finite where nothing moves.
        return (parameters.square().sum(dim=1).mean(dim=(1, 2)) + 1e-12).sqrt()

    def unit(self, shape: tuple[int, ...]) -> str:
        """Pixels, and the sides of a picture."""
        return f"pixels of displacement, of {shape[-2]} x {shape[-1]}"

    def arrays(self, parameters: Tensor) -> dict[str, Tensor]:
        """`grid`, (height, width, 2): the place that each pixel is read from."""
        return {"grid": grids(parameters[None])[0]}


def grids(displacements: Tensor) -> Tensor:
    """The places that pixels are read from, x before y, in [-1, 1] from edge to edge, (triggers, height, width, 2).

    Args:
        displacements: in pixels, (triggers, 2, height, width).
    """
    height, width = displacements.shape[-2:]
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    identity = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1).to(displacements)
    pixel = identity.new_tensor([2 / max(1, width - 1), 2 / max(1, height - 1)])
    return identity + displacements.movedim(1, -1) * pixel


def flows(height: int, width: int, control_points: int) -> Tensor:
    """The flows that a warp is made of, (3 + control_points ** 2, height, width).

    First those of an affine map: shift, and the distance from the centre along x and y in half sides. Then one smooth
    bump for each control point of a square grid, interpolated by cubic functions.
    """
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    count = control_points**2
    bumps = torch.eye(count).view(1, count, control_points, control_points)
    smooth = F.interpolate(bumps, size=(height, width), mode="bicubic", align_corners=True)[0]
    return torch.cat([torch.stack([torch.ones_like(x), x, y]), smooth])
