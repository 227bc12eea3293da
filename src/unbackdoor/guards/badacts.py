"""BadActs: activations of an input with a trigger lie outside of where those of clean inputs do."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._guarding.deciding import class_scores
from unbackdoor._guarding.guard import Learnt, Scored
from unbackdoor._models.blocks import (
    AnswerToken,
    answer_token,
    blocks,
    by_position,
    channels_first,
    kept_positions,
    vectors,
    watching_blocks,
)
from unbackdoor._models.calling import probe
from unbackdoor._models.stage_ends import changing
from unbackdoor._purification.run import Run
from unbackdoor._value import value

PLACES: tuple[AnswerToken, ...] = get_args(AnswerToken)
TRIES = 8  # of the bounds, each with half the pressure of the one before
PRESSURE = 0.1  # weight of the bounds' width, at first
CHANGE = 1.2  # of the pressure, each time that the accuracy is looked at
EVERY = 5  # epochs between two such looks


@value
class BadActs:
    """Compare the activations of an input with those of clean ones, in all blocks at once.

    The score is the share of an input's activations that lie within `width` standard deviations of their mean over
    clean inputs. Activations are those of the token that the model answers from, or the means of feature maps. With
    `purify`, a suspicious input is answered by the model with all activations cut to bounds, which are as narrow as the
    answers to clean inputs allow.

    Yi et al., "BadActs: A Universal Backdoor Defense in the Activation Space", Findings of ACL 2024,
    https://arxiv.org/abs/2405.11227

    Cannot see: triggers that leave activations where clean inputs have them, or move very few of them.

    Args:
        width: of the range, in standard deviations, more than 0.
        purify: answer suspicious inputs within bounds, instead of rejecting them.
        epochs: over the clean examples for learning the bounds, at least 1.
        learning_rate: of the bounds, more than 0.
        kept: share of the accuracy on clean examples that the bounds should leave, at most 1. One point less is the
            least that is accepted.

    Differences from the paper: for any depth and width, and for images. Half of the clean examples are fitted on
    whether they are classified correctly or not. Where no bounds keep the accuracy after 8 tries, the smallest and the
    largest activations of clean inputs are taken; the published loop may not end.
    """

    width: Annotated[float, Field(gt=0)] = 2.0
    purify: bool = False
    epochs: Annotated[int, Field(ge=1)] = 50
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    kept: Annotated[float, Field(gt=0, le=1)] = 0.98

    measure: ClassVar[str] = "the share of ordinary activations"
    suspicious: ClassVar[Literal["low", "high"]] = "low"

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> dict[str, Tensor]:
        """Fit mean and standard deviation of each activation, and bounds if they are asked for."""
        some = run.arithmetic.lay(probe(model, clean))
        names = blocks(model, some, run.head_name, "BadActs")
        place = answer_token(model, some, names[-1])
        learnt = {"place": torch.tensor(PLACES.index(place))}
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        with torch.no_grad(), watching_blocks(model, names) as watched:
            for batch in clean.batches(run.arithmetic.evaluation_batch):
                run.scores(model, batch.inputs)
                for name in names:
                    seen[name].append(vectors(watched[name][0], batch.inputs, place).double().cpu())
        for name, parts in seen.items():
            rows = torch.cat(parts)
            learnt[f"mean.{name}"], learnt[f"deviation.{name}"] = rows.mean(dim=0), rows.std(dim=0)
        return learnt | (_Bounds(self, model, clean, names, run).learnt() if self.purify else {})

    def scores(self, model: nn.Module, inputs: Dataset, learnt: Learnt, run: Run) -> Scored:
        """The shares of ordinary activations, (n,), and the answers of the same forward pass."""
        names = [key.removeprefix("mean.") for key in learnt if key.startswith("mean.")]
        place, device = PLACES[int(learnt["place"])], run.arithmetic.device
        centres = {name: learnt[f"mean.{name}"].to(device) for name in names}
        # Rounding makes a constant activation differ a little from its mean.
        reach = {
            name: self.width * learnt[f"deviation.{name}"].to(device) + 1e-5 * (1 + centres[name].abs())
            for name in names
        }
        count = sum(map(len, centres.values()))
        shares, answers, rows = [], [], []
        with watching_blocks(model, names) as watched:
            for batch in inputs.batches(run.arithmetic.evaluation_batch):
                answers.append(run.scores(model, batch.inputs))
                ordinary = torch.zeros(len(batch.labels), dtype=torch.int64, device=device)
                for name in names:
                    found = vectors(watched[name][0], batch.inputs, place)
                    ordinary += ((found - centres[name]).abs() <= reach[name]).sum(dim=1)
                shares.append(ordinary.double() / count)
                rows.append(batch.rows)
        order = torch.cat(rows).argsort()
        return Scored(torch.cat(shares)[order], torch.cat(answers)[order])

    @contextmanager
    def restrained(self, model: nn.Module, learnt: Learnt) -> Iterator[None]:
        """While the block runs, the activations of all blocks are cut to the bounds."""
        names = [key.removeprefix("low.") for key in learnt if key.startswith("low.")]
        with _cut(model, {name: (learnt[f"low.{name}"], learnt[f"high.{name}"]) for name in names}):
            yield


@contextmanager
def _cut(model: nn.Module, bounds: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Cut the features of blocks to bounds, which have the shape of one position; a gradient flows into them."""

    def change(name: str, features: Tensor) -> Tensor:
        low, high = bounds[name]
        return torch.minimum(torch.maximum(features, low.to(features)), high.to(features))

    with ExitStack() as stack:
        for name in bounds:
            stack.enter_context(changing(model.get_submodule(name), functools.partial(change, name)))
        yield


class _Bounds:
    """The search for bounds of all activations, [high - exp(margin), high], which clean inputs hardly touch."""

    def __init__(self, method: BadActs, model: nn.Module, clean: Dataset, names: list[str], run: Run) -> None:
        self.method, self.model, self.clean, self.names, self.run = method, model, clean, names, run
        self.plain = class_scores(model, clean, run)
        self.right = float((self.plain.argmax(dim=1) == clean.labels.cpu()).float().mean())
        self.low, self.high = self._extremes()

    def learnt(self) -> dict[str, Tensor]:
        """The bounds by block."""
        for attempt in range(TRIES):
            bounds = self._searched(PRESSURE / 2**attempt)
            if self._accuracy(bounds) >= (self.method.kept - 0.01) * self.right:
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
        optimizer = torch.optim.Adam([*high.values(), *margin.values()], lr=self.method.learning_rate)

        def bounds() -> dict[str, tuple[Tensor, Tensor]]:
            return {name: (high[name] - margin[name].exp(), high[name]) for name in self.names}

        with torch.enable_grad(), self.run.progress("learning bounds", self.method.epochs) as advance:
            for epoch in range(1, self.method.epochs + 1):
                for batch in self.clean.batches(self.run.recipe.batch_size):
                    with _cut(self.model, bounds()):
                        answers = self.run.scores(self.model, batch.inputs)
                    moved = (answers - self.plain[batch.rows.cpu()].to(answers)).square().mean()
                    (moved + pressure * _norm(list(margin.values()))).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                if epoch % EVERY == 0:
                    enough = self._accuracy(bounds()) >= self.method.kept * self.right
                    pressure *= CHANGE if enough else 1 / CHANGE
                advance()
        return bounds()

    def _accuracy(self, bounds: dict[str, tuple[Tensor, Tensor]]) -> float:
        """The share of clean examples that the model answers as labelled within the bounds."""
        with torch.no_grad(), _cut(self.model, bounds):
            answers = class_scores(self.model, self.clean, self.run)
        return float((answers.argmax(dim=1) == self.clean.labels.cpu()).float().mean())


def _norm(margins: list[Tensor]) -> Tensor:
    """The Euclidean norm of the widths of all bounds."""
    squares: Tensor = torch.cat([margin.exp().square().flatten() for margin in margins]).sum()
    return squares.sqrt()
