"""Bounds of activations, and a model whose activations are cut to them."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._guarding.deciding import class_scores
from unbackdoor._models.blocks import by_position, channels_first, kept_positions, watching_blocks
from unbackdoor._models.stage_ends import changing
from unbackdoor._purification.run import Run

TRIES = 8  # of the bounds, each with half the pressure of the one before
PRESSURE = 0.1  # weight of the bounds' width, at first
CHANGE = 1.2  # of the pressure, each time that the accuracy is looked at
EVERY = 5  # epochs between two such looks


@contextmanager
def cut(model: nn.Module, bounds: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Cut the features of blocks to bounds, which have the shape of one position; a gradient flows into them."""

    def change(name: str, features: Tensor) -> Tensor:
        low, high = bounds[name]
        return torch.minimum(torch.maximum(features, low.to(features)), high.to(features))

    with ExitStack() as stack:
        for name in bounds:
            stack.enter_context(changing(model.get_submodule(name), functools.partial(change, name)))
        yield


class BoundsSearch:
    """The search for bounds of all activations, [high - exp(margin), high], which clean inputs hardly touch.

    Args:
        model: without gradients.
        clean: labelled examples.
        names: of the blocks whose features are cut.
        run: of the guard.
        epochs: over the clean examples.
        learning_rate: of the bounds.
        kept: share of the accuracy on clean examples that they should leave; one point less is accepted.
    """

    def __init__(
        self,
        model: nn.Module,
        clean: Dataset,
        names: list[str],
        run: Run,
        *,
        epochs: int,
        learning_rate: float,
        kept: float,
    ) -> None:
        self.model, self.clean, self.names, self.run = model, clean, names, run
        self.epochs, self.learning_rate, self.kept = epochs, learning_rate, kept
        self.plain = class_scores(model, clean, run)
        self.right = float((self.plain.argmax(dim=1) == clean.labels.cpu()).float().mean())
        self.low, self.high = self._extremes()

    def learnt(self) -> dict[str, Tensor]:
        """The bounds by block."""
        for attempt in range(TRIES):
            bounds = self._searched(PRESSURE / 2**attempt)
            if self._accuracy(bounds) >= (self.kept - 0.01) * self.right:
                break
        else:
            self.run.warn("BadActs found no bounds that keep the accuracy; it takes the extremes of clean inputs.")
            bounds = {name: (self.low[name], self.high[name]) for name in self.names}
        named = {"low": 0, "high": 1}
        return {f"{end}.{name}": bounds[name][side].detach() for end, side in named.items() for name in self.names}

    @torch.no_grad()
    def _extremes(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The smallest and the largest activations; maps with the channels first have bounds of shape (width, 1, 1)."""
        low: dict[str, Tensor] = {}
        high: dict[str, Tensor] = {}
        with watching_blocks(self.model, self.names) as watched:
            for batch in self.clean.batches(self.run.arithmetic.evaluation_batch):
                self.run.scores(self.model, batch.inputs)
                for name in self.names:
                    features = watched[name][0]
                    rows = by_position(features, batch.inputs)
                    rows = rows[kept_positions(rows, batch.inputs)].float()
                    shape = (-1, 1, 1) if channels_first(features, batch.inputs) else (-1,)
                    least, most = rows.amin(dim=0).view(shape), rows.amax(dim=0).view(shape)
                    low[name] = torch.minimum(low.get(name, least), least)
                    high[name] = torch.maximum(high.get(name, most), most)
        return low, high

    def _searched(self, pressure: float) -> dict[str, tuple[Tensor, Tensor]]:
        """Bounds after all epochs: the answers to clean inputs stay, while the norm of the widths falls."""
        high = {name: self.high[name].clone().requires_grad_() for name in self.names}
        margin = {name: (self.high[name] - self.low[name] + 1e-6).log().requires_grad_() for name in self.names}
        optimizer = torch.optim.Adam([*high.values(), *margin.values()], lr=self.learning_rate)

        def bounds() -> dict[str, tuple[Tensor, Tensor]]:
            return {name: (high[name] - margin[name].exp(), high[name]) for name in self.names}

        with torch.enable_grad(), self.run.progress("learning bounds", self.epochs) as advance:
            for epoch in range(1, self.epochs + 1):
                for batch in self.clean.batches(self.run.recipe.batch_size):
                    with cut(self.model, bounds()):
                        answers = self.run.scores(self.model, batch.inputs)
                    moved = (answers - self.plain[batch.rows.cpu()].to(answers)).square().mean()
                    (moved + pressure * _norm(list(margin.values()))).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                if epoch % EVERY == 0:
                    enough = self._accuracy(bounds()) >= self.kept * self.right
                    pressure *= CHANGE if enough else 1 / CHANGE
                advance()
        return bounds()

    def _accuracy(self, bounds: dict[str, tuple[Tensor, Tensor]]) -> float:
        """The share of clean examples that the model answers as labelled within the bounds."""
        with torch.no_grad(), cut(self.model, bounds):
            answers = class_scores(self.model, self.clean, self.run)
        return float((answers.argmax(dim=1) == self.clean.labels.cpu()).float().mean())


def _norm(margins: list[Tensor]) -> Tensor:
    """The Euclidean norm of the widths of all bounds."""
    squares: Tensor = torch.cat([margin.exp().square().flatten() for margin in margins]).sum()
    return squares.sqrt()
