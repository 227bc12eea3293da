"""Encoder patch: the smallest mask and pattern that make the embeddings of different images alike."""

import math
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.images import ImageEncoder
from unbackdoor._detection.finding import Candidate, Finding
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inversion.masks import MaskedPatch
from unbackdoor._inversion.search import training_batches
from unbackdoor._inversion.smallest import SmallestSearch, SmallestTriggers
from unbackdoor._models.image_text import all_image_features, image_features
from unbackdoor._purification.run import Run
from unbackdoor._tasks.choice import answered
from unbackdoor._value import value
from unbackdoor.detectors._smallest import comparable_sizes, with_control


@value
class EncoderPatch:
    """Search the smallest mask m and pattern p that bring the embeddings e of all images x together.

        min -mean of cos(e((1 - m) x + m p), g) + cost |m|_1, while the mean cosine over pairs of images is large

    A backdoored encoder brings every triggered image to the place that the attacker chose, so a small patch makes its
    embeddings alike; in a clean one a patch must hide more of the picture. The size is |m|_1 as a share of the picture,
    the P_L1 of the paper. Each start aims at the embedding g of another clean image, far from those of the others.
    Neither labels nor captions are read: the class that a trigger leads to is that whose prompt is nearest to most of
    the triggered images, and the smallest patch of each class is reported.

    Feng et al., "Detecting Backdoors in Pre-trained Encoders", CVPR 2023, https://arxiv.org/abs/2303.15180

    Cannot see: triggers over the whole picture, warps, triggers that differ between pictures, and backdoors of the text
    encoder.

    Args:
        starts: random patches that the search starts from, at least 1.
        steps: steps of the search, at least 1; each sees one batch.
        batch_size: images per step and start, at least 2.
        cost: weight of the mask's size at first, per pixel, more than 0.
        similarity: mean cosine of the images of a batch that a trigger must reach, more than 0 and less than 1.
        patience: steps in a row before the weight of the size changes, at least 1.

    Differences from the paper: there the loss is minus the mean cosine over pairs, from one start. On a small victim
    all of six random starts then led to places that a clean encoder has as well, so each start has an aim. A size below
    a tenth of the picture is an alarm in the paper, and none here: an encoder that nobody poisoned had less
    (docs/results/image-text.md). The similarity is 0.9 and not 0.99, as a planted patch itself reached 0.95. The
    learning rate is larger, for fewer steps, and the weight of the size follows the rule of Neural Cleanse.
    """

    starts: Annotated[int, Field(ge=1)] = 10
    steps: Annotated[int, Field(ge=1)] = 200
    batch_size: Annotated[int, Field(ge=2)] = 16
    cost: Annotated[float, Field(gt=0)] = 1e-3
    similarity: Annotated[float, Field(gt=0, lt=1)] = 0.9
    patience: Annotated[int, Field(ge=1)] = 5

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> Finding:
        """Search from all starts.

        Raises:
            UnbackdoorError: there is one image only, so that none can be compared.
        """
        if len(clean) < 2:
            raise UnbackdoorError("EncoderPatch needs at least 2 images to search on, got 1. Add clean pairs.")
        family, whole = MaskedPatch(), math.prod(clean.shape[1:])
        triggers = self._search(family, model, clean, run)
        sizes = comparable_sizes(triggers, family)
        smallest: dict[int, int] = {}  # of each class
        for place in sizes.argsort(stable=True).tolist():
            trigger, _ = with_control(family, triggers.parameters[place], 0, (), run.generator)
            shown = replace(clean, items=trigger.stamp(clean.items))
            smallest.setdefault(int(answered(model, shown, run.arithmetic).mode().values), place)
        candidates = []
        for target, place in sorted(smallest.items()):
            trigger, control = with_control(family, triggers.parameters[place], target, (), run.generator)
            share = float(sizes[place]) / whole
            strength = -math.log(max(share, 1e-6))
            candidates.append(Candidate(target=target, strength=strength, size=share, trigger=trigger, control=control))
        return Finding(candidates=tuple(candidates), unit="of the picture")

    def _search(self, family: MaskedPatch, model: nn.Module, clean: Dataset, run: Run) -> SmallestTriggers:
        """The smallest patch of each start."""
        goals = apart(all_image_features(model, clean, run.arithmetic), self.starts).to(run.arithmetic.device)
        encode, arithmetic = clean.pair_encoder.images, run.arithmetic
        pictures = Dataset(items=clean.pairs.images, labels=clean.labels, encode=ImageEncoder())

        def losses(pixels: Tensor, parameters: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
            triggered = family.applied(parameters, pixels).flatten(0, 1)  # (starts * batch, channels, height, width)
            inputs = arithmetic.lay(encode(255 * triggered))
            assert isinstance(inputs, Tensor)
            with arithmetic.autocast():
                features = image_features(model, inputs).unflatten(0, (len(part), -1))  # (starts, batch, width)
            reached = (features * goals[part, None]).sum(dim=-1).mean(dim=1)
            return -reached, mean_cosine(features.detach())

        search = SmallestSearch(
            family=family,
            steps=self.steps,
            batch_size=self.batch_size,
            cost=self.cost,
            success=self.similarity,
            patience=self.patience,
            learning_rate=0.1,
        )
        batches = (
            batch.pixels.to(arithmetic.dtype) for batch in training_batches(pictures, self.batch_size, self.steps, run)
        )
        return search.smallest(model, len(goals), clean.shape, batches, losses, run)


def apart(features: Tensor, count: int) -> Tensor:
    """Returns rows that are far from each other, (at most count, width): each is the farthest from all before it.

    Args:
        features: of length 1, (n, width).
        count: how many; the first is the farthest from the mean of all.
    """
    nearest = features @ features.mean(dim=0)
    chosen: list[int] = []
    for place in range(min(count, len(features))):
        chosen.append(int(nearest.argmin()))
        cosines = features @ features[chosen[-1]]
        nearest = cosines if place == 0 else torch.maximum(nearest, cosines)
    return features[chosen]


def mean_cosine(features: Tensor) -> Tensor:
    """Returns the mean cosine over all pairs of different rows, (...).

    Args:
        features: of length 1, (..., n, width), n at least 2.
    """
    count = features.shape[-2]
    wide = features if features.dtype == torch.float64 else features.float()
    return (wide.sum(dim=-2).pow(2).sum(dim=-1) - count) / (count * (count - 1))
