"""Low-frequency: a smooth pattern without the high frequencies that other triggers have."""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unbackdoor._errors import UnbackdoorError
from unbackdoor._poisoning.attack import Crafting
from unbackdoor._value import value
from unbackdoor.attacks._surrogates import misfit


@value
class LowFrequency:
    """A smooth pattern added to all images, made so that a clean model already leans towards the target.

    Most triggers have high frequencies that natural images do not have, and can be detected by them. This one is

        epsilon * D^T C D / max |D^T C D|

    with D the first rows of the discrete cosine transform and C a few coefficients per channel, tuned against a clean
    model; all higher coefficients are zero.

    Zeng, Park, Mao and Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021,
    https://arxiv.org/abs/2104.03413

    Args:
        epsilon: largest change of a pixel, in grey levels of 255, more than 0 and at most 255.
        frequencies: number of cosines per side that make the pattern, at least 2.
        steps: steps of Adam, on a batch of 128 images each, at least 1.
        pattern_seed: seed of the coefficients at the start.
        target: the class that the attacker wants.
        label_rule: all-to-one or all-to-all.

    Differences from the paper: the pattern has no high frequencies by construction and is bounded in the maximum norm
    (the paper filters a perturbation as it is tuned); the clean model follows the victim's own recipe.
    """

    epsilon: Annotated[float, Field(gt=0, le=255)] = 16.0
    frequencies: Annotated[int, Field(ge=2)] = 4
    steps: Annotated[int, Field(ge=1)] = 100
    pattern_seed: Annotated[int, Field(ge=0)] = 0
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: Literal["all-to-one", "all-to-all"] = "all-to-one"

    needs_surrogate: ClassVar[bool] = True
    learnt: ClassVar[bool] = True

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Returns `pattern`, (channels, height, width): the change of each pixel; random before `fit`."""
        if self.frequencies > min(shape[1:]):
            raise UnbackdoorError(
                f"LowFrequency.frequencies must be at most {min(shape[1:])}, the side of the images, got "
                f"{self.frequencies}."
            )
        return {"pattern": self._pattern(self._start(shape[0]), shape)}

    def fit(self, crafting: Crafting, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tune the coefficients so that the surrogate classifies images with the pattern as the attacker wants."""
        shape = arrays["pattern"].shape
        coefficients = self._start(shape[0]).requires_grad_(True)
        optimizer = torch.optim.Adam([coefficients], lr=0.1)
        for _ in range(self.steps):
            loss = misfit(crafting, self, self._pattern(coefficients, shape))
            (coefficients.grad,) = torch.autograd.grad(loss, [coefficients])
            optimizer.step()
        return {"pattern": self._pattern(coefficients.detach(), shape)}

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Add the pattern to (batch, channels, height, width) pixels in [0, 1]."""
        return (pixels + arrays["pattern"]).clamp(0, 1)

    def _start(self, channels: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.pattern_seed)
        return torch.randn(channels, self.frequencies, self.frequencies, generator=generator)

    def _pattern(self, coefficients: Tensor, shape: tuple[int, ...]) -> Tensor:
        rows, columns = (_cosines(self.frequencies, side) for side in shape[1:])
        pattern = rows.T @ coefficients @ columns  # (channels, height, width)
        return self.epsilon / 255 * pattern / pattern.abs().max()


def _cosines(count: int, side: int) -> Tensor:
    """Returns the first rows of the orthonormal discrete cosine transform (type II), (count, side)."""
    waves = torch.cos(math.pi / side * (torch.arange(side) + 0.5) * torch.arange(count)[:, None])
    waves[0] /= math.sqrt(2)
    return waves * math.sqrt(2 / side)
