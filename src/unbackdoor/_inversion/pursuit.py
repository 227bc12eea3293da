"""Triggers that follow a model while it unlearns them."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Dataset
from unbackdoor._inversion.contrast import searches
from unbackdoor._inversion.search import frozen
from unbackdoor._inversion.smallest import TriggerFamily
from unbackdoor._inversion.triggers import encoded
from unbackdoor._purification.run import Run

KINDS = "patch", "pattern", "low-frequency pattern"  # warps of clean models are as small as planted ones
NEAR = 2.0  # times the smallest trigger of a kind: a larger one says more of what any model does than of this one
FEW = 1 / 3  # of the classes: where more have a trigger near the smallest of a kind, it is natural for this model
GROWTH = 3.0  # times the size that was found: how far a trigger may grow as it follows the model
BACK = 0.02  # of the steps start again from what was found, in case that the trigger lost its way


@dataclass(kw_only=True)
class Follower:
    """A trigger that a search found, which takes a step towards its class whenever the model has changed.

    Args:
        kind: of trigger, for messages.
        family: of the trigger.
        target: the class that it leads to.
        found: its free parameters as the search left them, (1, ...).
        size: its size then.
        learning_rate: of Adam.
    """

    kind: str
    family: TriggerFamily
    target: int
    found: Tensor
    size: float
    learning_rate: float

    def __post_init__(self) -> None:
        self.restart_()

    def restart_(self) -> None:
        """Go back to what the search found."""
        self.free = self.found.clone().requires_grad_(True)
        self.optimizer = torch.optim.Adam([self.free], lr=self.learning_rate, betas=(0.5, 0.9))

    def step_(self, model: nn.Module, pixels: Tensor, clean: Dataset, run: Run) -> None:
        """Follow the model by one step of Adam down CE(f(trigger(x)), t), within the size that it may have.

        Args:
            model: f, in its present state; its weights get no gradient.
            pixels: of a batch, in [0, 1], (batch, channels, height, width).
            clean: the examples, which encode pixels.
            run: arithmetic and randomness.
        """
        if float(torch.rand((), generator=run.generator)) < BACK:
            with torch.no_grad():
                self.free.copy_(self.found)
        self.optimizer.zero_grad(set_to_none=True)
        with frozen(model):
            scores = run.scores(model, encoded(clean, self._on(pixels), run))
            F.cross_entropy(scores, torch.full_like(scores[:, 0], self.target, dtype=torch.long)).backward()
        self.optimizer.step()
        with torch.no_grad():
            size = float(self.family.size(self.family.bounded(self.free)))
            if size > GROWTH * self.size:
                self.free.copy_(self.family.shrunk(self.free, GROWTH * self.size / size))

    @torch.no_grad()
    def shown(self, pixels: Tensor) -> Tensor:
        """Returns pixels with the trigger, (batch, channels, height, width), without gradients."""
        return self._on(pixels)

    def _on(self, pixels: Tensor) -> Tensor:
        parameters = self.family.bounded(self.free)
        return self.family.applied(parameters, pixels.to(parameters))[0].to(pixels.dtype)


def followers(model: nn.Module, clean: Dataset, run: Run, *, steps: int) -> list[list[Follower]]:
    """Returns, of each kind of trigger, those to the few classes with the smallest; kinds are left out that have none.

    Of these classes only those count that the most kinds lead to.

    Args:
        model: the suspect.
        clean: images to search on.
        run: of the purification.
        steps: of each search.
    """
    kinds = []
    known = searches(clean.shape, steps)
    for kind in KINDS:
        search = known[kind]
        triggers = search(model, clean, run)
        sizes = triggers.sizes.tolist()
        near = [target for target, size in enumerate(sizes) if size < torch.inf and size <= NEAR * min(sizes)]
        kinds.append(
            [
                Follower(
                    kind=kind,
                    family=search.family,
                    target=target,
                    found=triggers.free[target : target + 1],
                    size=sizes[target],
                    learning_rate=search.learning_rate,
                )
                for target in near
            ]
        )
    classes = run.classes(model, clean)
    odd = [each for each in kinds if 0 < len(each) <= max(1, FEW * classes)]
    leading = Counter(each.target for kind in odd for each in kind)
    most = max(leading.values(), default=0)
    return [agreed for kind in odd if (agreed := [each for each in kind if leading[each.target] == most])]
