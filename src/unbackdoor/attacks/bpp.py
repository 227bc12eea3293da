"""BppAttack: fewer colours, dithered."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unbackdoor._value import value


@value
class Bpp:
    """Fewer grey levels per channel, with Floyd-Steinberg dithering; changes of other images serve as cover.

    With m levels a pixel x in [0, 1] becomes round(x (m - 1)) / (m - 1), and the rounding error is passed on to the
    pixels to the right and below (7/16, 3/16, 5/16, 1/16). The change is hardly visible and differs in each image.
    Cover examples carry the change of another image and keep their label, so that the change must fit the image.

    Wang, Zhai and Ma, "BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via Image
    Quantization and Contrastive Adversarial Learning", CVPR 2022, https://arxiv.org/abs/2205.13383

    Args:
        levels: grey levels per channel that are left, 2 to 255.
        dither: pass rounding errors on to the neighbours; otherwise round plainly.
        cover_ratio: cover examples, as a multiple of the poisoned ones, at least 0.
        target: the class that the attacker wants.
        label_rule: all-to-one or all-to-all.

    Differences from the paper: the poisoned set is drawn once and kept, so augmentation comes after the trigger and low
    rates implant less easily (the paper controls the training); its adversarial examples are left out.
    """

    levels: Annotated[int, Field(ge=2, le=255)] = 8
    dither: bool = True
    cover_ratio: Annotated[float, Field(ge=0)] = 1.0
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: Literal["all-to-one", "all-to-all"] = "all-to-one"

    train_time: ClassVar[str] = "quantised; cover rows get another image's change and keep their label"

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Returns nothing: the trigger is a function of the image alone."""
        return {}

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Quantise (batch, channels, height, width) pixels in [0, 1]."""
        steps = self.levels - 1
        return _dithered(pixels, steps) if self.dither else (pixels * steps).round() / steps

    def cover(self, pixels: Tensor, arrays: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Add the change of another image, the one before in a random order."""
        order = torch.randperm(len(pixels), generator=generator).to(pixels.device)
        others = torch.empty_like(order)
        others[order] = order.roll(1)
        return (pixels + (self.apply(pixels, arrays) - pixels)[others]).clamp(0, 1)


def _dithered(pixels: Tensor, steps: int) -> Tensor:
    """Floyd-Steinberg dithering of all images at once, and of all independent pixels at once.

    The pixel of row i and column j waits for its left neighbour and for the row above up to column j + 1. So all pixels
    of the same time t = j + 2 i are rounded together, and hand their errors on to the times t + 1, t + 2 and t + 3.
    """
    batch, channels, height, width = pixels.shape
    flat = pixels.permute(2, 3, 0, 1).reshape(height * width, batch * channels) * steps
    errors = flat.new_zeros(4, height + 1, batch * channels)  # of the next four times, by row
    for time in range(width + 2 * (height - 1)):
        first, last = max(0, (time - width + 2) // 2), min(height - 1, time // 2)
        # The next pixel of the same time is one row down and two columns back; with steps of 0 there is only one row.
        step, start = max(1, width - 2), first * (width - 2) + time
        here = flat[start : start + (last - first) * step + 1 : step]
        wished = here + errors[time % 4, first : last + 1]
        here.copy_(wished).round_().clamp_(0, steps)
        error = wished.sub_(here)
        errors[time % 4] = 0
        for later, lower, share in ((1, 0, 7 / 16), (1, 1, 3 / 16), (2, 1, 5 / 16), (3, 1, 1 / 16)):
            errors[(time + later) % 4, first + lower : last + 1 + lower].add_(error, alpha=share)
    return (flat / steps).view(height, width, batch, channels).permute(2, 3, 0, 1)
