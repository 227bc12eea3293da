"""Patterns that are added to whole pictures: a family of triggers for the smallest search."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unbackdoor._inversion.smallest import Kind

START = 1 / 255  # root mean square of the patterns that a search starts from, in the range of pixels


@dataclass(frozen=True, eq=False)
class AdditivePattern:
    """A pattern that is added to pixels; its size is its root mean square in grey levels of 255. A `TriggerFamily`.

    Its free parameters are weights of the products of two vectors, one down the columns and one across the rows.

    Args:
        down: vectors down a column of pixels, (count, height): those of `cosines`, or the unit vectors, of which every
            pattern is made.
        across: vectors across a row, (count, width).
    """

    down: Tensor
    across: Tensor

    kind: ClassVar[Kind] = "pattern"

    @classmethod
    def free(cls, shape: tuple[int, ...]) -> "AdditivePattern":
        """All patterns on pictures of shape (channels, height, width)."""
        return cls(*(torch.eye(side) for side in shape[1:]))

    @classmethod
    def of_low_frequency(cls, shape: tuple[int, ...], share: float) -> "AdditivePattern":
        """The patterns that are sums of slow cosines.

        Args:
            shape: of a picture, (channels, height, width).
            share: of the cosines along each side, from the lowest frequency, in (0, 1]; at least one is taken.
        """
        return cls(*(cosines(side, max(1, round(share * side))) for side in shape[1:]))

    def start(self, classes: int, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Normal weights of one grey level, (classes, channels, count, count)."""
        size = (classes, shape[0], len(self.down), len(self.across))
        return START * torch.randn(size, generator=generator, dtype=dtype)

    def bounded(self, free: Tensor) -> Tensor:
        """Patterns in [-1, 1], (triggers, channels, height, width)."""
        return (self.down.T.to(free) @ free @ self.across.to(free)).clamp(-1, 1)

    def shrunk(self, free: Tensor, factor: float) -> Tensor:
        """Weights times a factor."""
        return factor * free

    def applied(self, parameters: Tensor, pixels: Tensor) -> Tensor:
        """Pixels with each pattern added and clamped to [0, 1], (triggers, batch, channels, height, width)."""
        return (pixels + parameters[:, None]).clamp(0, 1)

    def size(self, parameters: Tensor) -> Tensor:
        """The root mean square of each pattern, in grey levels of 255, (triggers,)."""
        # The tiny addend keeps the gradient finite at a pattern of zeros.
        return 255 * (parameters.square().flatten(1).mean(dim=1) + 1e-12).sqrt()

    def unit(self, shape: tuple[int, ...]) -> str:
        """Grey levels."""
        return "grey levels of 255, root mean square"

    def arrays(self, parameters: Tensor) -> dict[str, Tensor]:
        """`pattern`, (channels, height, width)."""
        return {"pattern": parameters}


def cosines(length: int, count: int) -> Tensor:
    """The vectors of the discrete cosine transform with the lowest frequencies, (count, length).

    They are orthogonal. They are scaled such that a sum of products of two has the root mean square of its weights.
    """
    places, frequencies = torch.arange(length) + 0.5, torch.arange(count)[:, None]
    waves = torch.cos(math.pi * frequencies * places / length)
    return waves / waves.square().mean(dim=1, keepdim=True).sqrt() / math.sqrt(count)
