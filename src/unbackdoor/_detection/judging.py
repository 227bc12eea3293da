"""Judging a shortcut on held-out clean examples: how many of them it moves."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.finding import Candidate
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._tasks.choice import answered
from unbackdoor._tasks.proportion import Proportion

PROVEN = 0.5  # of the held-out examples: a shortcut that moves fewer is not one to its class


@dataclass(frozen=True, repr=False)
class ExactShare(Proportion):
    """A proportion with the exact 95 % interval (Clopper and Pearson 1934); `n` may be 0.

    >>> ExactShare(36, 41).interval
    (0.738, 0.9592)
    """

    @property
    def value(self) -> float:
        """The share, in [0, 1]; 0 of none."""
        return self.count / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high end, in [0, 1], to four digits."""
        from scipy.stats import beta

        low = beta.ppf(0.025, self.count, self.n - self.count + 1) if self.count else 0.0
        high = beta.ppf(0.975, self.count + 1, self.n - self.count) if self.count < self.n else 1.0
        return round(float(low), 4), round(float(high), 4)


@dataclass(frozen=True)
class HeldOut:
    """Clean examples that no search has seen, and the model's answers to them.

    Args:
        model: the suspect.
        data: the examples.
        arithmetic: of scoring.
        predicted: the model's answers, (n,).
    """

    model: nn.Module
    data: Dataset
    arithmetic: Arithmetic
    predicted: Tensor

    @classmethod
    def of(cls, model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> "HeldOut":
        """The same, with the answers of the model."""
        return cls(model, data, arithmetic, answered(model, data, arithmetic))

    def judged(self, candidate: Candidate) -> tuple[ExactShare | None, ExactShare | None]:
        """How many examples a candidate's trigger and its control move; None for one that there is not."""
        pair = (candidate.trigger, candidate.control)
        ours, random = (None if each is None else self.moved(each, candidate) for each in pair)
        return ours, random

    def moved(self, trigger: Trigger, candidate: Candidate) -> ExactShare:
        """How many examples of other classes, by label and by the model's answer, a trigger moves to the target.

        Args:
            trigger: of the candidate, or its control.
            candidate: names the target, and the source classes if it has any.
        """
        chosen = self.others(candidate)
        if len(chosen) == 0:
            return ExactShare(0, 0)
        shown = replace(chosen, items=trigger.stamp(chosen.items))
        return ExactShare(int((answered(self.model, shown, self.arithmetic) == candidate.target).sum()), len(chosen))

    def others(self, candidate: Candidate) -> Dataset:
        """The examples that a candidate's trigger could move: of other classes by label and by the model's answer."""
        labels = self.data.labels.cpu()
        others = (labels != candidate.target) & (self.predicted != candidate.target)
        if candidate.sources:
            others &= torch.isin(labels, torch.tensor(candidate.sources))
        return self.data.select(others.nonzero().flatten())
