"""Masks and patterns, one of each per class: the search of Neural Cleanse, and its anomaly index."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Dataset
from unbackdoor._inversion.search import frozen, training_batches
from unbackdoor._inversion.triggers import InvertedTrigger, encoded, in_pixels
from unbackdoor._purification.run import Run


class MaskedPatterns(NamedTuple):
    """A trigger for each class: masks (classes, 1, height, width), patterns (classes, channels, height, width)."""

    masks: Tensor
    patterns: Tensor


def stamp(masks: Tensor, patterns: Tensor) -> InvertedTrigger:
    """The triggers (1 - m) x + m p, one after the other over the examples of a batch.

    Args:
        masks: (triggers, 1, height, width), in [0, 1].
        patterns: (triggers, channels, height, width), in [0, 1].
    """

    def stamped(pixels: Tensor) -> Tensor:
        turn = torch.arange(len(pixels), device=pixels.device) % len(masks)
        return (1 - masks[turn]) * pixels + masks[turn] * patterns[turn]

    return stamped


@dataclass(frozen=True, kw_only=True)
class MaskSearch:
    """The inversion of Neural Cleanse; its defaults are those of `NeuralCleanse`, which has the formulas.

    Args:
        steps: of the search; each sees one batch for every class.
        batch_size: examples per step and class.
        cost: weight of a mask's size at the start.
        success: share of a batch that a trigger must move to its class.
        patience: steps in a row before a class's weight changes.
        threshold: anomaly index above which a class is an outlier.
    """

    steps: int = 100
    batch_size: int = 32
    cost: float = 1e-3
    success: float = 0.98
    patience: int = 5
    threshold: float = 2.0

    def __call__(
        self, model: nn.Module, clean: Dataset, run: Run, last: InvertedTrigger | None = None
    ) -> InvertedTrigger:
        """The outliers' triggers, or those of all classes; an `Inversion`."""
        triggers, outliers = self.outliers(model, clean, run)
        if len(outliers) == 0:
            run.note("Neural Cleanse: the triggers of all classes are taken.")
            return stamp(triggers.masks, triggers.patterns)
        return stamp(triggers.masks[outliers], triggers.patterns[outliers])

    def outliers(self, model: nn.Module, clean: Dataset, run: Run) -> tuple[MaskedPatterns, Tensor]:
        """The triggers of all classes, and the labels of the outliers, (outliers,)."""
        triggers = self.smallest(model, clean, run)
        sizes = triggers.masks.sum(dim=(1, 2, 3))  # (classes,)
        indices = anomaly_index(sizes)
        outliers = (indices > self.threshold).nonzero().flatten()
        smallest = int(sizes.argmin())
        names = ", ".join(map(clean.class_name, outliers.tolist()))
        run.note(
            f"Neural Cleanse: {f'outliers {names}' if names else 'no class is an outlier'} (the smallest trigger is "
            f"that of {clean.class_name(smallest)}, |m| = {float(sizes[smallest]):.1f}, anomaly index "
            f"{float(indices[smallest]):.2f})."
        )
        return triggers, outliers

    def smallest(self, model: nn.Module, clean: Dataset, run: Run) -> MaskedPatterns:
        """The smallest successful mask and its pattern for every class; of a class without success the latest.

        All classes are searched together, in chunks that fit memory, by Adam at learning rate 0.1.

        Args:
            model: in its present state.
            clean: images.
            run: of the purification.
        """
        classes, (channels, height, width) = run.head(model).out_features, clean.shape
        device, dtype = run.arithmetic.device, run.arithmetic.dtype
        start = torch.rand((classes, 1 + channels, height, width), generator=run.generator, dtype=dtype) * 0.98 + 0.01
        free = (2 * start - 1).atanh().to(device).requires_grad_(True)
        optimizer = torch.optim.Adam([free], lr=0.1, betas=(0.5, 0.9))
        costs = torch.full((classes,), self.cost, device=device, dtype=dtype)
        above, below = torch.zeros_like(costs), torch.zeros_like(costs)
        best, smallest = _bounded(free).detach(), torch.full_like(costs, torch.inf)
        chunk = max(1, run.arithmetic.evaluation_batch // self.batch_size)
        data = in_pixels(clean, augmented=False)
        with frozen(model), run.progress("inverting triggers", self.steps) as advance:
            for batch in training_batches(data, self.batch_size, self.steps, run):
                pixels, reached = batch.pixels.to(dtype), torch.zeros_like(costs)
                tried = _bounded(free).detach()
                optimizer.zero_grad(set_to_none=True)
                for part in torch.arange(classes, device=device).split(chunk):
                    both = _bounded(free[part])  # (chunk, 1 + channels, height, width)
                    loss, reached[part] = _loss(model, clean, run, pixels, both, part, costs[part])
                    loss.backward()
                optimizer.step()
                size, good = tried[:, 0].sum(dim=(1, 2)), reached >= self.success
                better = (good & (size < smallest)) | (smallest.isinf() & ~good)
                best[better], smallest[good & better] = tried[better], size[good & better]
                above, below = torch.where(good, above + 1, 0), torch.where(good, 0, below + 1)
                costs = torch.where(above == self.patience, costs * 2, costs)
                costs = torch.where(below == self.patience, costs / 2**1.5, costs)
                above[above == self.patience] = 0
                below[below == self.patience] = 0
                advance()
        return MaskedPatterns(best[:, :1], best[:, 1:])


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


def anomaly_index(sizes: Tensor) -> Tensor:
    """How many scaled median absolute deviations each size lies below the median; 0 for those above it.

    The median of an even number is the mean of the middle two. If more than half of the sizes are equal, a smaller
    one has an infinite index.
    """
    middle = sizes.quantile(0.5)
    deviation = 1.4826 * (sizes - middle).abs().quantile(0.5)  # of a normal distribution: its standard deviation
    gap = (middle - sizes).clamp(min=0)
    return torch.where(gap > 0, gap / deviation, 0.0)
