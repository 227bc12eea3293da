"""SIBA: a universal trigger that is both sparse and faint."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unbackdoor._errors import UnbackdoorError
from unbackdoor._poisoning.attack import Crafting
from unbackdoor._value import value
from unbackdoor.attacks._surrogates import misfit


@value
class SIBA:
    """One change of a few pixels by a few grey levels, made against a clean model.

    The pattern delta solves

        min E min(CE(f(x + delta), target), 10)   subject to   |delta|_0 <= k,  |delta|_inf <= epsilon

    with k counted in pixels, over images of other classes than the target. Steps along the sign of the gradient within
    the chosen pixels alternate with a new choice: the k pixels with the largest gradient, summed over their channels.

    Gao, Li, Gong, Li, Xia and Wang, "Backdoor Attack with Sparse and Invisible Trigger", IEEE TIFS 2024,
    https://arxiv.org/abs/2306.05209

    Args:
        pixels: number of pixels that may change (k), at least 1.
        epsilon: largest change of a pixel, in grey levels of 255, more than 0 and at most 255.
        steps: steps of the search, on a batch of 128 images each, at least 1.
        choose_every: number of steps from one choice of pixels to the next, at least 1.
        target: the class that the attacker wants.
        label_rule: all-to-one or all-to-all.

    Differences from the paper: steps count batches, not passes over the data; steps and choice follow a running mean of
    the gradient, and the steps shrink to zero (the authors' are of one length, and the best pattern seen is kept). The
    clean model follows the victim's own recipe. Poisoned examples are drawn from all classes (the authors take none of
    the target's).
    """

    pixels: Annotated[int, Field(ge=1)] = 100
    epsilon: Annotated[float, Field(gt=0, le=255)] = 8.0
    steps: Annotated[int, Field(ge=1)] = 100
    choose_every: Annotated[int, Field(ge=1)] = 10
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: Literal["all-to-one", "all-to-all"] = "all-to-one"

    needs_surrogate: ClassVar[bool] = True
    learnt: ClassVar[bool] = True

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Returns `pattern`, (channels, height, width): the change of each pixel; zero before `fit`."""
        if self.pixels > shape[1] * shape[2]:
            raise UnbackdoorError(
                f"SIBA.pixels must be at most {shape[1] * shape[2]}, the pixels of an image, got {self.pixels}."
            )
        return {"pattern": torch.zeros(shape)}

    def fit(self, crafting: Crafting, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        """Alternate between choosing pixels and changing them, so that they mislead the surrogate."""
        bound = self.epsilon / 255
        pattern = arrays["pattern"].clone()
        mask = torch.zeros(pattern.shape[1:])
        mean = torch.zeros_like(pattern)
        for step in range(self.steps):
            dense = pattern.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(misfit(crafting, self, dense), [dense])
            mean = 0.9 * mean + 0.1 * gradient
            if step % self.choose_every == 0:
                mask = self._largest(mean)
            reach = 0.8 * bound * (1 - step / self.steps)
            pattern = (mask * (pattern - reach * mean.sign())).clamp(-bound, bound)
        return {"pattern": pattern}

    def _largest(self, gradient: Tensor) -> Tensor:
        """Returns 1 at the k pixels with the largest gradient, (height, width)."""
        strength = gradient.abs().sum(dim=0)
        mask = torch.zeros(strength.numel())
        mask[strength.flatten().topk(self.pixels).indices] = 1
        return mask.view_as(strength)

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Add the pattern to (batch, channels, height, width) pixels in [0, 1]."""
        return (pixels + arrays["pattern"]).clamp(0, 1)
