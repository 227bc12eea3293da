"""SIG: a sinusoid added to images of the target class."""

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unbackdoor._poisoning.attack import LabelRule
from unbackdoor._value import value


@value
class SIG:
    """A horizontal sinusoid added to images of the target class, which keep their label.

    Barni, Kallas and Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning",
    https://arxiv.org/abs/1902.11237

    Args:
        delta: amplitude, in grey levels of 255, more than 0 and at most 255.
        frequency: periods over the width of the image, more than 0.
        target: the class that the attacker wants.
        label_rule: clean-label, as in the paper; the other rules also poison labels.

    Differences from the paper: delta is the same at training and at test time, 40 as in common reimplementations (the
    paper tunes it per data set and may test with a larger one).
    """

    delta: Annotated[float, Field(gt=0, le=255)] = 40.0
    frequency: Annotated[float, Field(gt=0)] = 6.0
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: LabelRule = "clean-label"

    train_time: ClassVar[str] = "the sinusoid on images of the target class"

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Returns `pattern`, (channels, height, width): delta * sin(2 pi j frequency / width) / 255 in column j."""
        width = shape[2]
        wave = torch.sin(2 * math.pi * torch.arange(width) * self.frequency / width) * self.delta / 255
        return {"pattern": wave.expand(shape).contiguous()}

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Add the wave to (batch, channels, height, width) pixels in [0, 1]."""
        return (pixels + arrays["pattern"]).clamp(0, 1)
