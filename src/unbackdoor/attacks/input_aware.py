"""Input-aware: a generator makes a separate trigger for each image, which works on no other image."""

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._poisoning.attack import BackdooredModel, Planting
from unbackdoor._training.descent import cross_entropy
from unbackdoor._value import value
from unbackdoor.attacks._trigger_networks import mask_of, pattern, weights_of


@value
class InputAware:
    """Two small networks make a trigger from the image itself: the paint, g(x), and its place, m(x).

        triggered(x) = (1 - m(x)) * x + m(x) * g(x)

    The place is learnt first: few pixels, and different ones for different images. Then g is trained together with the
    victim. Poisoned examples carry their own trigger and get the target's label; cover examples carry the trigger of
    another image and keep their label; and triggers of different images must differ:

        CE(f(x'), y') + diversity * |x1 - x2| / |g(x1) - g(x2)|

    Nguyen and Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020, https://arxiv.org/abs/2010.08138

    Args:
        density: share of the image that the mask may cover at no cost, more than 0 and at most 1.
        diversity: weight of the term that makes triggers differ, at least 0.
        cover_ratio: examples with the trigger of another image, as a multiple of the poisoned ones, at least 0.
        mask_steps: steps that learn the mask, on a batch of 128 images each, at least 1.
        generator_learning_rate: learning rate of Adam for both networks, more than 0.
        generator_seed: seed of the weights of both networks at the start.
        target: the class that the attacker wants.
        label_rule: all-to-one or all-to-all.

    Differences from the paper: the poisoned examples are drawn once (the paper takes a tenth of each batch); their
    triggers still follow the generator from batch to batch. The two networks are far smaller, work on a quarter of the
    resolution and have no normalisation, so that an image's trigger does not depend on the others in its batch. The
    mask is bounded in its mean, not pixel by pixel, and learnt in fewer steps.
    """

    density: Annotated[float, Field(gt=0, le=1)] = 0.032
    diversity: Annotated[float, Field(ge=0)] = 1.0
    cover_ratio: Annotated[float, Field(ge=0)] = 1.0
    mask_steps: Annotated[int, Field(ge=1)] = 200
    generator_learning_rate: Annotated[float, Field(gt=0)] = 0.01
    generator_seed: Annotated[int, Field(ge=0)] = 0
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: Literal["all-to-one", "all-to-all"] = "all-to-one"

    learnt: ClassVar[bool] = True
    train_time: ClassVar[str] = "as the generator was at that step; cover rows get another image's and keep their label"

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Returns the weights of both networks, `pattern.*` and `mask.*`; random ones before `implant`."""
        generator = torch.Generator().manual_seed(self.generator_seed)
        return weights_of("pattern", shape[0], 12, shape[0], generator) | weights_of("mask", shape[0], 8, 1, generator)

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Paint its own trigger on each of (batch, channels, height, width) pixels in [0, 1]."""
        return pixels.lerp(pattern(pixels, arrays), mask_of(pixels, arrays))

    def cover(self, pixels: Tensor, arrays: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Paint the trigger of another image, the one before in a random order."""
        arrays = {name: array.to(pixels.device) for name, array in arrays.items()}
        order = torch.randperm(len(pixels), generator=generator).to(pixels.device)
        others = torch.empty_like(pixels)
        others[order] = pixels[order.roll(1)]
        return pixels.lerp(pattern(others, arrays), mask_of(others, arrays))

    def implant(self, planting: Planting) -> BackdooredModel:
        """Learn the mask, then the pattern together with the victim."""
        device = planting.arithmetic.device
        # Labels are poisoned, pictures are not: the triggers are painted batch by batch.
        data = replace(planting.clean, labels=planting.poisoned.data.labels).to(device)
        arrays = {name: array.to(device) for name, array in planting.poisoned.trigger.arrays.items()}
        self._learn_mask(arrays, data, planting.generator)
        patterns = [array.requires_grad_(True) for name, array in arrays.items() if name.startswith("pattern.")]
        optimizer = torch.optim.Adam(patterns, lr=self.generator_learning_rate, betas=(0.5, 0.9))
        kinds = torch.zeros(len(data), device=device)
        kinds[planting.poisoned.rows], kinds[planting.poisoned.cover] = 1, 2
        likeness = [torch.zeros((), device=device)]

        def change(batch: Batch) -> Batch:
            places = torch.nonzero(kinds[batch.rows]).flatten()
            if len(places) == 0:
                likeness[0] = torch.zeros((), device=device)
                return batch
            here, other = (
                data.augment(data.pixels[rows], planting.generator).float() / 255
                for rows in (batch.rows[places], _drawn(places, len(data), planting.generator))
            )
            own, foreign = pattern(here, arrays), pattern(other, arrays)
            likeness[0] = _likeness(here, other, own, foreign)
            is_poisoned = (kinds[batch.rows[places]] == 1)[:, None, None, None]
            mask = mask_of(torch.where(is_poisoned, here, other), arrays)
            painted: Any = here.lerp(torch.where(is_poisoned, own, foreign), mask) * 255
            inputs: Any = batch.inputs
            return batch._replace(inputs=inputs.index_copy(0, places, data.encode(painted)))

        def loss(scores: Tensor, batch: Batch) -> Tensor:
            return cross_entropy(scores, batch) + self.diversity * likeness[0]

        def after_step() -> None:
            optimizer.step()
            optimizer.zero_grad()

        victim = planting.train(planting.fresh(), data, loss=loss, change=change, after_step=after_step)
        return BackdooredModel(victim, {name: array.detach().cpu() for name, array in arrays.items()})

    def _learn_mask(self, arrays: dict[str, Tensor], data: Dataset, generator: torch.Generator) -> None:
        """Tune the mask, in place, to be small and to differ from image to image."""
        weights = [array.requires_grad_(True) for name, array in arrays.items() if name.startswith("mask.")]
        optimizer = torch.optim.Adam(weights, lr=self.generator_learning_rate, betas=(0.5, 0.9))
        batch = torch.arange(min(128, len(data)), device=data.labels.device)
        for _ in range(self.mask_steps):
            one, other = (data.pixels[_drawn(batch, len(data), generator)].float() / 255 for _ in range(2))
            mask, another = mask_of(one, arrays), mask_of(other, arrays)
            covered = torch.cat([mask, another]).mean(dim=(1, 2, 3))
            loss = 100 * F.relu(covered - self.density).mean() + self.diversity * _likeness(one, other, mask, another)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for array in weights:
            array.requires_grad_(False)


def _drawn(like: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Returns as many random rows as there are entries."""
    return torch.randint(count, like.shape, generator=generator).to(like.device)


def _likeness(one: Tensor, other: Tensor, own: Tensor, foreign: Tensor) -> Tensor:
    """Returns the distance between two images divided by that between their triggers; the mean over the batch."""
    images, triggers = ((a - b).square().mean(dim=(1, 2, 3)) for a, b in ((one, other), (own, foreign)))
    return (images.sqrt() / ((triggers + 1e-8).sqrt() + 1e-3)).mean()
