"""Blended: a picture or noise mixed in over the whole image."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unbackdoor._poisoning.attack import LabelRule
from unbackdoor._value import value
from unbackdoor.attacks._pictures import picture


@value
class Blended:
    """A picture or noise mixed in over the whole image.

    Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning",
    https://arxiv.org/abs/1712.05526

    Args:
        pattern: `noise` (uniform, seeded) or an image file.
        pattern_seed: seed of the noise.
        ratio: share of the pattern in the mixture, more than 0 and at most 1.
        target: the class that the attacker wants.
        label_rule: all-to-one, all-to-all or clean-label.

    Differences from the paper: the ratio is the same at training and at test time (the paper also tests with larger
    ones).
    """

    pattern: str = "noise"
    pattern_seed: Annotated[int, Field(ge=0)] = 0
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: LabelRule = "all-to-one"

    modality: ClassVar[tuple[str, ...]] = ("images", "image-text")

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Returns `pattern`, (channels, height, width)."""
        if self.pattern == "noise":
            return {"pattern": torch.rand(shape, generator=torch.Generator().manual_seed(self.pattern_seed))}
        return {"pattern": picture(self.pattern, "Blended.pattern", shape, "noise")}

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Mix the pattern into (batch, channels, height, width) pixels in [0, 1]."""
        return (1 - self.ratio) * pixels + self.ratio * arrays["pattern"]
