"""The smallest trigger of a family for each class: one search for patches, additive patterns and warps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Dataset
from unbackdoor._inversion.search import frozen, training_batches
from unbackdoor._inversion.triggers import encoded, in_pixels, size_for_model
from unbackdoor._purification.run import Run

Kind = Literal["patch", "pattern", "warp"]


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

    def shrunk(self, free: Tensor, factor: float) -> Tensor:
        """The free parameters of triggers whose size is that of these times a factor in (0, 1]."""

    def applied(self, parameters: Tensor, pixels: Tensor) -> Tensor:
        """Pixels with each trigger on, (triggers, batch, channels, height, width).

        Args:
            parameters: of some triggers, (triggers, ...).
            pixels: in [0, 1], (batch, channels, height, width); or, for a family that is searched for pairs of classes,
                others for each trigger, (triggers, batch, channels, height, width).
        """

    def size(self, parameters: Tensor) -> Tensor:
        """The size of each trigger in the family's unit, (triggers,)."""

    def unit(self, shape: tuple[int, ...]) -> str:
        """The unit of sizes in words, for pictures of shape (channels, height, width)."""

    @property
    def kind(self) -> Kind:
        """How its triggers change pixels; see `unbackdoor.attacks.Inverted`."""

    def arrays(self, parameters: Tensor) -> dict[str, Tensor]:
        """The arrays of one trigger, as `unbackdoor.attacks.Inverted` takes them.

        Args:
            parameters: of that trigger, (...).
        """


class SearchSettings(Protocol):
    """The settings of a search that a detector or a purifier has among its fields; see `SmallestSearch`."""

    @property
    def steps(self) -> int:
        """Steps of Adam."""

    @property
    def batch_size(self) -> int:
        """Examples per step and trigger."""

    @property
    def cost(self) -> float:
        """The weight of a trigger's size at the start."""

    @property
    def success(self) -> float:
        """The share of a batch that a trigger must move."""

    @property
    def patience(self) -> int:
        """Steps in a row before a trigger's weight changes."""


Losses = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of pixels, the parameters of some triggers and their numbers, the loss of each and how far it succeeds, (k,)."""


class SmallestTriggers(NamedTuple):
    """The parameters of each class's trigger, (classes, ...), its size, (classes,), and its free parameters.

    The size of a class without success is infinite; its parameters are the latest. A search can go on from the free
    ones, (classes, ...).
    """

    parameters: Tensor
    sizes: Tensor
    free: Tensor


@dataclass(frozen=True, kw_only=True)
class SmallestSearch:
    """Minimise CE(f(trigger(x)), t) + cost * size for every class t, and keep the smallest trigger that succeeds.

    With a reference g, a trigger must move f and leave g where it is: CE(g(trigger(x)), g(x)) is added to the loss,
    with g(x) the class that g answers, and an example that g follows to t counts as a failure.

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

    @classmethod
    def of(cls, settings: SearchSettings, family: TriggerFamily, learning_rate: float) -> "SmallestSearch":
        """The search with the settings of a detector or a purifier.

        Args:
            settings: has them as fields.
            family: of the triggers.
            learning_rate: of Adam.
        """
        return cls(
            family=family,
            steps=settings.steps,
            batch_size=settings.batch_size,
            cost=settings.cost,
            success=settings.success,
            patience=settings.patience,
            learning_rate=learning_rate,
        )

    def __call__(
        self,
        model: nn.Module,
        clean: Dataset,
        run: Run,
        pairs: Tensor | None = None,
        reference: nn.Module | None = None,
    ) -> SmallestTriggers:
        """Search the triggers of all classes together, in chunks that fit memory.

        Args:
            model: in its present state.
            clean: images.
            run: arithmetic, randomness, progress.
            pairs: source and target, (pairs, 2): one trigger for each pair, which must move examples of the source
                class, instead of one for each class.
            reference: a model that the triggers must not move, in eval mode and without gradients of its own.
        """
        targets = torch.arange(run.classes(model, clean)) if pairs is None else pairs[:, 1]
        targets = targets.to(run.arithmetic.device)

        def moved(pixels: Tensor, parameters: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
            shown = pixels if pairs is None else pixels[part]
            return self._losses(model, reference, clean, run, shown, parameters, targets[part])

        batches = self._batches(in_pixels(clean, augmented=False), run, pairs)
        size = size_for_model(clean.image_encoder, clean.shape)
        return self.smallest(model, len(targets), clean.shape, size, batches, moved, run)

    def smallest(
        self,
        model: nn.Module,
        count: int,
        shape: tuple[int, ...],
        size: tuple[int, int],
        batches: Iterator[Tensor],
        losses: Losses,
        run: Run,
    ) -> SmallestTriggers:
        """Search some triggers together by any loss, in chunks that fit memory.

        Args:
            model: in its present state.
            count: number of triggers.
            shape: of a picture, (channels, height, width).
            size: (height, width) at which the model gets it.
            batches: of pixels in [0, 1], one for each step.
            losses: of the triggers of a chunk without their size, and how far each succeeds.
            run: arithmetic, randomness, progress.
        """
        device, dtype = run.arithmetic.device, run.arithmetic.dtype
        free = self.family.start(count, shape, run.generator, dtype).to(device).requires_grad_(True)
        optimizer = torch.optim.Adam([free], lr=self.learning_rate, betas=(0.5, 0.9))
        costs = torch.full((count,), self.cost, device=device, dtype=dtype)
        above, below = torch.zeros_like(costs), torch.zeros_like(costs)
        best, smallest = free.detach().clone(), torch.full_like(costs, torch.inf)
        chunk = max(1, run.arithmetic.gradient_batch(size) // self.batch_size)
        parts = torch.arange(count, device=device).split(chunk)
        with frozen(model), run.progress("inverting triggers", self.steps * len(parts)) as advance:
            for pixels in batches:
                reached = torch.zeros_like(costs)
                tried = free.detach().clone()
                optimizer.zero_grad(set_to_none=True)
                for part in parts:
                    parameters = self.family.bounded(free[part])
                    each, reached[part] = losses(pixels, parameters, part)
                    (each + costs[part] * self.family.size(parameters)).sum().backward()
                    advance()
                optimizer.step()
                sizes, good = self.family.size(self.family.bounded(tried)), reached >= self.success
                # Where a model's gradient is not finite, the last finite parameters stay.
                better = ((good & (sizes < smallest)) | (smallest.isinf() & ~good)) & sizes.isfinite()
                best[better], smallest[good & better] = tried[better], sizes[good & better]
                above, below = torch.where(good, above + 1, 0), torch.where(good, 0, below + 1)
                costs = torch.where(above == self.patience, costs * 2, costs)
                costs = torch.where(below == self.patience, costs / 2**1.5, costs)
                above[above == self.patience] = 0
                below[below == self.patience] = 0
        return SmallestTriggers(self.family.bounded(best), smallest, best)

    def _batches(self, data: Dataset, run: Run, pairs: Tensor | None) -> Iterator[Tensor]:
        """Batches of pixels, (batch, channels, height, width), or others for each pair, (pairs, batch, ...)."""
        if pairs is None:
            for batch in training_batches(data, self.batch_size, self.steps, run):
                yield batch.pixels.to(run.arithmetic.dtype)
            return
        rows = [(data.labels == source).nonzero().flatten() for source in pairs[:, 0].tolist()]
        for _ in range(self.steps):
            drawn = [each[torch.randint(len(each), (self.batch_size,), generator=run.generator)] for each in rows]
            pixels = data.inputs(torch.cat(drawn))
            assert isinstance(pixels, Tensor)
            run.examples_seen += len(pixels)
            yield pixels.to(run.arithmetic.dtype).unflatten(0, (len(pairs), self.batch_size))

    def _losses(
        self,
        model: nn.Module,
        reference: nn.Module | None,
        clean: Dataset,
        run: Run,
        pixels: Tensor,
        parameters: Tensor,
        targets: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The losses of some classes, and the share of examples that each of their triggers moves, (classes,)."""
        triggered = self.family.applied(parameters, pixels).flatten(0, 1)  # (classes * batch, channels, height, width)
        inputs = encoded(clean, triggered, run)
        scores = run.scores(model, inputs)
        wanted = targets.repeat_interleave(len(triggered) // len(targets))
        each, moved = F.cross_entropy(scores, wanted, reduction="none"), scores.argmax(dim=1) == wanted
        if reference is not None:
            plain = pixels.flatten(0, -4)  # those of each pair, or the same for all classes
            with torch.no_grad():
                own = run.scores(reference, encoded(clean, plain, run)).argmax(dim=1)
            own, followed = own.repeat(len(triggered) // len(plain)), run.scores(reference, inputs)
            each = each + F.cross_entropy(followed, own, reduction="none")
            moved &= (followed.argmax(dim=1) != wanted) | (own == wanted)
        each = each.view(len(parameters), -1).mean(dim=1)
        reached = moved.view(len(parameters), -1).to(parameters.dtype).mean(dim=1)
        return each, reached
