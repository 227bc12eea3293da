"""The smallest trigger of a family for each class: one search for patches, additive patterns and warps."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Dataset
from unbackdoor._inversion.search import frozen, training_batches
from unbackdoor._inversion.triggers import encoded, in_pixels
from unbackdoor._purification.run import Run


class TriggerFamily(Protocol):
    """Triggers of one kind, one for each class.

    A search changes free parameters, which may have any value; `bounded` makes those of triggers of them.
    """

    def start(self, classes: int, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """The free parameters that a search starts from, (classes, ...).

        Args:
            classes: how many triggers.
            shape: of a picture, (channels, height, width).
            generator: of the draw.
            dtype: of the parameters.
        """

    def bounded(self, free: Tensor) -> Tensor:
        """The parameters of triggers, (triggers, ...), of free ones."""

    def applied(self, parameters: Tensor, pixels: Tensor) -> Tensor:
        """Pixels with each trigger on, (triggers, batch, channels, height, width).

        Args:
            parameters: of some triggers, (triggers, ...).
            pixels: in [0, 1], (batch, channels, height, width).
        """

    def size(self, parameters: Tensor) -> Tensor:
        """The size of each trigger in the family's unit, (triggers,)."""


class SmallestTriggers(NamedTuple):
    """The parameters of each class's trigger, (classes, ...), and its size, (classes,).

    The size of a class without success is infinite; its parameters are the latest.
    """

    parameters: Tensor
    sizes: Tensor


@dataclass(frozen=True, kw_only=True)
class SmallestSearch:
    """Minimise CE(f(trigger(x)), t) + cost * size for every class t, and keep the smallest trigger that succeeds.

    The cost of a class doubles when its trigger succeeds for `patience` steps in a row, and is divided by 2^1.5 when it
    fails for as many, as in Neural Cleanse (https://doi.org/10.1109/SP.2019.00031).

    Args:
        family: of the triggers.
        steps: of Adam; each sees one batch for every class.
        batch_size: examples per step and class.
        cost: weight of a trigger's size at the start.
        success: share of a batch that a trigger must move to its class.
        patience: steps in a row before a class's weight changes.
        learning_rate: of Adam.
    """

    family: TriggerFamily
    steps: int
    batch_size: int
    cost: float
    success: float
    patience: int
    learning_rate: float

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> SmallestTriggers:
        """Search the triggers of all classes together, in chunks that fit memory.

        Args:
            model: in its present state.
            clean: images.
            run: arithmetic, randomness, progress.
        """
        classes = run.head(model).out_features
        device, dtype = run.arithmetic.device, run.arithmetic.dtype
        free = self.family.start(classes, clean.shape, run.generator, dtype).to(device).requires_grad_(True)
        optimizer = torch.optim.Adam([free], lr=self.learning_rate, betas=(0.5, 0.9))
        costs = torch.full((classes,), self.cost, device=device, dtype=dtype)
        above, below = torch.zeros_like(costs), torch.zeros_like(costs)
        best, smallest = self.family.bounded(free).detach(), torch.full_like(costs, torch.inf)
        chunk = max(1, run.arithmetic.evaluation_batch // self.batch_size)
        data = in_pixels(clean, augmented=False)
        with frozen(model), run.progress("inverting triggers", self.steps) as advance:
            for batch in training_batches(data, self.batch_size, self.steps, run):
                pixels, reached = batch.pixels.to(dtype), torch.zeros_like(costs)
                tried = self.family.bounded(free).detach()
                optimizer.zero_grad(set_to_none=True)
                for part in torch.arange(classes, device=device).split(chunk):
                    parameters = self.family.bounded(free[part])
                    loss, reached[part] = self._loss(model, clean, run, pixels, parameters, part, costs[part])
                    loss.backward()
                optimizer.step()
                size, good = self.family.size(tried), reached >= self.success
                better = (good & (size < smallest)) | (smallest.isinf() & ~good)
                best[better], smallest[good & better] = tried[better], size[good & better]
                above, below = torch.where(good, above + 1, 0), torch.where(good, 0, below + 1)
                costs = torch.where(above == self.patience, costs * 2, costs)
                costs = torch.where(below == self.patience, costs / 2**1.5, costs)
                above[above == self.patience] = 0
                below[below == self.patience] = 0
                advance()
        return SmallestTriggers(best, smallest)

    def _loss(
        self,
        model: nn.Module,
        clean: Dataset,
        run: Run,
        pixels: Tensor,
        parameters: Tensor,
        targets: Tensor,
        costs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The sum of some classes' losses, and the share of examples that each of their triggers moves."""
        triggered = self.family.applied(parameters, pixels).flatten(0, 1)  # (classes * batch, channels, height, width)
        scores = run.scores(model, encoded(clean, triggered, run))
        wanted = targets.repeat_interleave(len(pixels))
        each = F.cross_entropy(scores, wanted, reduction="none").view(len(parameters), -1).mean(dim=1)
        reached = (scores.argmax(dim=1) == wanted).view(len(parameters), -1).to(parameters.dtype).mean(dim=1)
        return (each + costs * self.family.size(parameters)).sum(), reached
