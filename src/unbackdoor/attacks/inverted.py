"""Inverted: the trigger that an audit found by inversion, so that `evaluate` can repeat its success."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from unbackdoor._errors import UnbackdoorError
from unbackdoor._inversion.smallest import Kind
from unbackdoor._poisoning.attack import LabelRule
from unbackdoor._registry.entries import Modality
from unbackdoor._value import value


@value
class Inverted:
    """The trigger that an audit found by inversion. Its arrays are in the `attack.json` of the audit.

    Args:
        family: `patch`, x' = (1 - mask) x + mask pattern; `pattern`, x' = x + pattern; or `warp`, each pixel is read
            from another place.
        target: the class that it moves examples to.
        sources: the only classes that it moves; empty for all.
        label_rule: all-to-one.

    Differences from the paper: there is no paper on this value. It stands for a trigger that was found, not planted.
    """

    family: Kind = "patch"
    target: Annotated[int, Field(ge=0)] = 0
    sources: tuple[Annotated[int, Field(ge=0)], ...] = ()
    label_rule: LabelRule = "all-to-one"

    modality: ClassVar[tuple[Modality, ...]] = ("images", "image-text")
    train_time: ClassVar[str] = "not known: the trigger was found by inversion"

    def arrays(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Refuse: the fields alone do not make the trigger."""
        raise UnbackdoorError("Inverted has no trigger of its own. Take the attack.json that an audit wrote.")

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Put the trigger on pixels in [0, 1], (batch, channels, height, width).

        Args:
            pixels: of the examples.
            arrays: `mask` (1, height, width) and `pattern` (channels, height, width) of a patch; `pattern` of a
                pattern; `grid` (height, width, 2) of a warp, the place in [-1, 1] that each pixel is read from.
        """
        if self.family == "patch":
            return (1 - arrays["mask"]) * pixels + arrays["mask"] * arrays["pattern"]
        if self.family == "pattern":
            return (pixels + arrays["pattern"]).clamp(0, 1)
        grid = arrays["grid"].expand(len(pixels), -1, -1, -1)
        return F.grid_sample(pixels, grid, align_corners=True, padding_mode="border")


def shuffled(kind: Kind, arrays: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """A random trigger of the same size: the control that shows how much the found one owes to its form.

    The mask of a patch stays and its pattern is drawn again; the pixels of a pattern change places; a warp keeps the
    distance of each pixel and turns all directions by one angle.
    """
    if kind == "patch":
        return {**arrays, "pattern": torch.rand(arrays["pattern"].shape, generator=generator)}
    if kind == "pattern":
        pattern = arrays["pattern"]
        order = torch.randperm(pattern[0].numel(), generator=generator)
        return {"pattern": pattern.flatten(1)[:, order].view(pattern.shape)}
    grid = arrays["grid"]
    height, width = grid.shape[:2]
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    identity = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1)  # (height, width, 2)
    pixels = torch.tensor([max(1, width - 1), max(1, height - 1)]) / 2  # in one unit of the grid
    angle = (0.25 + 0.5 * torch.rand((), generator=generator)) * 2 * torch.pi  # by a quarter of a turn at least
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    return {"grid": identity + (grid - identity) * pixels @ turn / pixels}
