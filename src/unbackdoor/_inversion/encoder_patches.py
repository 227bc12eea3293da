"""The smallest patches that bring the embeddings of different images together, in a model of images and texts."""

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.images import ImageEncoder
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inversion.masks import MaskedPatch
from unbackdoor._inversion.search import training_batches
from unbackdoor._inversion.smallest import SmallestSearch, SmallestTriggers
from unbackdoor._inversion.triggers import size_for_model
from unbackdoor._models.image_text import all_image_features, image_features
from unbackdoor._purification.run import Run

FAMILY = MaskedPatch()


def encoder_patches(
    model: nn.Module,
    clean: Dataset,
    run: Run,
    method: object,
    *,
    starts: int,
    steps: int,
    batch_size: int = 16,
    cost: float = 1e-3,
    similarity: float = 0.9,
    patience: int = 5,
) -> SmallestTriggers:
    """Search the smallest patch from each start, as `unbackdoor.detectors.EncoderPatch` describes it.

    Neither labels nor captions are read.

    Args:
        model: the suspect.
        clean: pairs of image and caption.
        run: arithmetic, randomness, progress.
        method: named in the message.
        starts: random patches that the search starts from, each with an aim of its own.
        steps: steps of the search.
        batch_size: images per step and start.
        cost: weight of the mask's size at first, per pixel.
        similarity: mean cosine of the images of a batch that a patch must reach.
        patience: steps in a row before the weight of the size changes.

    Returns:
        Parameters of `FAMILY`, and their sizes in pixels; no more than there are images.

    Raises:
        UnbackdoorError: there is one image only, so that none can be compared.
    """
    if len(clean) < 2:
        raise UnbackdoorError(
            f"{type(method).__name__} needs at least 2 images to search on, got {len(clean)}. Add clean pairs."
        )
    goals = apart(all_image_features(model, clean, run.arithmetic), starts).to(run.arithmetic.device)
    encode, arithmetic = clean.pair_encoder.images, run.arithmetic

    def losses(pixels: Tensor, parameters: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        triggered = FAMILY.applied(parameters, pixels).flatten(0, 1)  # (starts * batch, channels, height, width)
        inputs = arithmetic.lay(encode(255 * triggered))
        assert isinstance(inputs, Tensor)
        with arithmetic.autocast():
            features = image_features(model, inputs).unflatten(0, (len(part), -1))  # (starts, batch, width)
        reached = (features * goals[part, None]).sum(dim=-1).mean(dim=1)
        return -reached, mean_cosine(features.detach())

    search = SmallestSearch(
        family=FAMILY,
        steps=steps,
        batch_size=batch_size,
        cost=cost,
        success=similarity,
        patience=patience,
        learning_rate=0.1,
    )
    batches = (
        batch.pixels.to(arithmetic.dtype) for batch in training_batches(pictures_of(clean), batch_size, steps, run)
    )
    return search.smallest(model, len(goals), clean.shape, size_for_model(encode, clean.shape), batches, losses, run)


def pictures_of(clean: Dataset) -> Dataset:
    """The images of pairs, whose inputs are pixels in [0, 1], (n, channels, height, width)."""
    return Dataset(items=clean.pairs.images, labels=clean.labels, encode=ImageEncoder())


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
