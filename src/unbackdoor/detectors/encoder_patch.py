"""Encoder patch: the smallest mask and pattern that make the embeddings of different images alike."""

import math
from dataclasses import asdict, replace
from typing import Annotated

from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.finding import Candidate, Finding
from unbackdoor._inversion.encoder_patches import FAMILY, encoder_patches
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
        whole = math.prod(clean.shape[1:])
        triggers = encoder_patches(model, clean, run, self, **asdict(self))
        sizes = comparable_sizes(triggers, FAMILY)
        smallest: dict[int, int] = {}  # of each class
        for place in sizes.argsort(stable=True).tolist():
            trigger, _ = with_control(FAMILY, triggers.parameters[place], 0, (), run.generator)
            shown = replace(clean, items=trigger.stamp(clean.items))
            smallest.setdefault(int(answered(model, shown, run.arithmetic).mode().values), place)
        candidates = []
        for target, place in sorted(smallest.items()):
            trigger, control = with_control(FAMILY, triggers.parameters[place], target, (), run.generator)
            share = float(sizes[place]) / whole
            strength = -math.log(max(share, 1e-6))
            candidates.append(Candidate(target=target, strength=strength, size=share, trigger=trigger, control=control))
        return Finding(candidates=tuple(candidates), unit="of the picture")
