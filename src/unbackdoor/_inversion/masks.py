"""Masks and patterns, one per class: the search of Neural Cleanse, and its anomaly index."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Dataset
from unbackdoor._inversion.carrying import Reversed, encoded, in_pixels
from unbackdoor._inversion.searching import frozen, training_batches
from unbackdoor._purification.run import Run


class Masked(NamedTuple):
    """The triggers of all classes: mask (classes, 1, height, width), pattern (classes, channels, height, width)."""

    mask: Tensor
    pattern: Tensor


def stamp(mask: Tensor, pattern: Tensor) -> Reversed:
    """The triggers (1 - m) x + m p, one after the other over the examples of a batch.

    Args:
        mask: (triggers, 1, height, width), in [0, 1].
        pattern: (triggers, channels, height, width), in [0, 1].
    """

    def stamped(pixels: Tensor) -> Tensor:
        turn = torch.arange(len(pixels), device=pixels.device) % len(mask)
        return (1 - mask[turn]) * pixels + mask[turn] * pattern[turn]

    return stamped


def smallest_masks(
    model: nn.Module,
    clean: Dataset,
    run: Run,
    *,
    steps: int,
    batch_size: int,
    cost: float,
    success: float,
    patience: int,
) -> Masked:
    """The smallest successful mask and its pattern for every class; of a class without success the latest.

    All classes are searched together, in chunks that fit memory, by Adam at learning rate 0.1; see `NeuralCleanse`.

    Args:
        model: in its present state.
        clean: images.
        run: of the purification.
        steps: each sees one batch for every class.
        batch_size: examples per step and class.
        cost: weight of a mask's size at the start.
        success: share of a batch that a trigger must move to its class.
        patience: steps in a row before a class's weight changes.
    """
    classes, (channels, height, width) = run.head(model).out_features, clean.shape
    device, dtype = run.arithmetic.device, run.arithmetic.dtype
    start = torch.rand((classes, 1 + channels, height, width), generator=run.generator, dtype=dtype) * 0.98 + 0.01
    free = (2 * start - 1).atanh().to(device).requires_grad_(True)
    optimizer = torch.optim.Adam([free], lr=0.1, betas=(0.5, 0.9))
    costs = torch.full((classes,), cost, device=device, dtype=dtype)
    above, below = torch.zeros_like(costs), torch.zeros_like(costs)
    best, smallest = _bounded(free).detach(), torch.full_like(costs, torch.inf)
    chunk = max(1, run.arithmetic.evaluation_batch // batch_size)
    data = in_pixels(clean, augmented=False)
    with frozen(model), run.progress("reversing triggers", steps) as advance:
        for batch in training_batches(data, batch_size, steps, run):
            assert isinstance(batch.inputs, Tensor)
            pixels, reached = batch.inputs.to(dtype), torch.zeros_like(costs)
            tried = _bounded(free).detach()
            optimizer.zero_grad(set_to_none=True)
            for part in torch.arange(classes, device=device).split(chunk):
                both = _bounded(free[part])  # (chunk, 1 + channels, height, width)
                loss, reached[part] = _loss(model, clean, run, pixels, both, part, costs[part])
                loss.backward()
            optimizer.step()
            size, good = tried[:, 0].sum(dim=(1, 2)), reached >= success
            better = (good & (size < smallest)) | (smallest.isinf() & ~good)
            best[better], smallest[good & better] = tried[better], size[good & better]
            above, below = torch.where(good, above + 1, 0), torch.where(good, 0, below + 1)
            costs = torch.where(above == patience, costs * 2, costs)
            costs = torch.where(below == patience, costs / 2**1.5, costs)
            above[above == patience] = 0
            below[below == patience] = 0
            advance()
    return Masked(best[:, :1], best[:, 1:])


def _bounded(free: Tensor) -> Tensor:
    return free.tanh() / 2 + 0.5


def _loss(
    model: nn.Module, clean: Dataset, run: Run, pixels: Tensor, both: Tensor, targets: Tensor, costs: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum of some classes' losses, and the share of examples that each of their triggers moves."""
    mask, pattern = both[:, None, :1], both[:, None, 1:]
    stamped = ((1 - mask) * pixels + mask * pattern).flatten(0, 1)  # (classes * batch, channels, height, width)
    scores = run.scores(model, encoded(clean, stamped, run))
    wanted = targets.repeat_interleave(len(pixels))
    each = F.cross_entropy(scores, wanted, reduction="none").view(len(both), -1).mean(dim=1)
    reached = (scores.argmax(dim=1) == wanted).view(len(both), -1).to(both.dtype).mean(dim=1)
    return (each + costs * both[:, 0].sum(dim=(1, 2))).sum(), reached


def anomaly(size: Tensor) -> Tensor:
    """How many scaled median absolute deviations each size lies below the median; 0 for those above it.

    The median of an even number is the mean of the middle two. Where more than half of the sizes are equal, a smaller
    one is infinitely odd.
    """
    middle = size.quantile(0.5)
    deviation = 1.4826 * (size - middle).abs().quantile(0.5)  # of a normal distribution: its standard deviation
    gap = (middle - size).clamp(min=0)
    return torch.where(gap > 0, gap / deviation, 0.0)
