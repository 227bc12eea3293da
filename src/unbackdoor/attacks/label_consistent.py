"""Label-consistent: hard-to-learn images of the target class with corner patches."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import logits
from unbackdoor._poisoning.attack import Crafting
from unbackdoor._poisoning.trigger import stamped
from unbackdoor._value import value
from unbackdoor.attacks._patches import checkerboard


@value
class LabelConsistent:
    """Images of the target class, perturbed so that a clean model misclassifies them, with a patch in each corner.

    Turner, Tsipras and Madry, "Label-Consistent Backdoor Attacks", https://arxiv.org/abs/1912.02771

    Args:
        epsilon: largest change of a pixel by the perturbation, in grey levels of 255, at least 0.
        steps: steps of projected gradient ascent, at least 1.
        amplitude: change of a pixel by the patches, in grey levels, more than 0 and at most 255.
        size: side of each corner patch, at least 1.
        target: the class that the attacker wants.
        label_rule: clean-label.

    Differences from the paper: the perturbation is bounded in the maximum norm (16 of 255; the paper's own is 300 in
    the Euclidean norm of 255-level pixels, or a GAN), against a clean model of the victim's own recipe.
    """

    epsilon: Annotated[float, Field(ge=0, le=255)] = 16.0
    steps: Annotated[int, Field(ge=1)] = 20
    amplitude: Annotated[float, Field(gt=0, le=255)] = 255.0
    size: Annotated[int, Field(ge=1)] = 3
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: Literal["clean-label"] = "clean-label"

    needs_surrogate: ClassVar[bool] = True
    train_time: ClassVar[str] = "adversarial perturbation against a clean model, then the corner patches"
    test_time: ClassVar[str] = "the corner patches alone, rounded to 8 bits"

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Returns `pattern`, (channels, height, width): the change of each pixel, from -1 to 1."""
        channels, height, width = shape
        if 2 * self.size > min(height, width):
            raise UnbackdoorError(
                f"LabelConsistent.size must be at most {min(height, width) // 2}, half the side of the images, got "
                f"{self.size}."
            )
        patch = (checkerboard(self.size) * 2 - 1) * self.amplitude / 255
        pattern = torch.zeros(height, width)
        for rows in (slice(None, self.size), slice(height - self.size, None)):
            for columns in (slice(None, self.size), slice(width - self.size, None)):
                pattern[rows, columns] = patch
        return {"pattern": pattern.expand(channels, -1, -1).contiguous()}

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Add the corner patches to (batch, channels, height, width) pixels in [0, 1]."""
        return (pixels + arrays["pattern"]).clamp(0, 1)

    def craft(self, crafting: Crafting, arrays: dict[str, Tensor]) -> Tensor:
        """Returns the train-time form: perturbed against the surrogate, then patched; uint8."""
        if crafting.surrogate is None:
            raise UnbackdoorError("LabelConsistent needs a clean model to perturb images against: pass surrogate=.")
        victims = crafting.data.select(crafting.rows)
        surrogate, training = crafting.surrogate, crafting.surrogate.training
        surrogate.eval()
        perturbed = stamped(victims.pixels, lambda pixels: self._perturbed(pixels, victims, surrogate), chunk=256)
        surrogate.train(training)
        return stamped(perturbed, lambda pixels: self.apply(pixels, arrays))

    def _perturbed(self, pixels: Tensor, data: Dataset, surrogate: nn.Module) -> Tensor:
        """Perturbs by projected gradient ascent on the loss of the true (target) class."""
        bound = self.epsilon / 255
        labels = torch.full((len(pixels),), self.target)
        device = next(surrogate.parameters()).device
        moved = pixels.clone()
        for _ in range(self.steps):
            moved.requires_grad_(True)
            inputs = data.image_encoder(moved.mul(255)).to(device)
            loss = F.cross_entropy(logits(surrogate, inputs), labels.to(device))
            (gradient,) = torch.autograd.grad(loss, moved)
            with torch.no_grad():
                moved = moved + 2.5 * bound / self.steps * gradient.sign()
                moved = pixels + (moved - pixels).clamp(-bound, bound)
                moved = moved.clamp(0, 1)
        return moved.detach()
