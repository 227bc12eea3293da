"""A share with its interval, and whether it is hardly better than a guess."""

import math
from dataclasses import dataclass

from torch import Tensor

MISFIT = "its labels, their order or the preprocessing probably do not fit the model"
"""Why a model that others trained may be near chance."""


@dataclass(frozen=True)
class Proportion:
    """`count` out of `n`, with the 95 % Wilson score interval (Wilson 1927).

    >>> Proportion(1, 10)
    10.0 % (1.8 to 40.4 %, n = 10)
    """

    count: int
    n: int

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.count / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high end, in [0, 1]."""
        z = 1.959963984540054  # the 97.5th percentile of the normal distribution
        scale = 1 + z * z / self.n
        centre = (self.value + z * z / (2 * self.n)) / scale
        half = z * math.sqrt(self.value * (1 - self.value) / self.n + z * z / (4 * self.n**2)) / scale
        low = 0.0 if self.count == 0 else centre - half
        high = 1.0 if self.count == self.n else centre + half
        return low, high

    def to_json(self) -> dict[str, float | int]:
        """`value`, `n`, `low` and `high`."""
        low, high = self.interval
        return {"value": self.value, "n": self.n, "low": low, "high": high}

    def __repr__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} ({100 * low:.1f} to {high:.1%}, n = {self.n:,})".replace("%", " %")


def proportion_of(hits: Tensor) -> Proportion:
    """The share of hits, (n,), bool."""
    return Proportion(int(hits.sum()), len(hits))


def near_chance(accuracy: Proportion, classes: int) -> bool:
    """Whether an accuracy is hardly better than a guess: at most a quarter of the way from chance to 100 %."""
    chance = 1 / classes
    return accuracy.interval[0] <= chance or accuracy.value <= chance + (1 - chance) / 4


def chance_doubt(owner: str, accuracy: Proportion, classes: int, where: str, cause: str = MISFIT) -> str | None:
    """A sentence that doubts an accuracy near chance, or one that could be chance; None for others.

    Args:
        owner: the model, as the sentence begins.
        accuracy: of the model.
        classes: the number of classes.
        where: name of the examples.
        cause: why an accuracy is near chance, and the way out.
    """
    if classes < 2:
        return f"{owner} cannot be judged by its accuracy on {where}, which has one class only. Add examples of others."
    if not near_chance(accuracy, classes):
        return None
    if accuracy.value > 1 / classes + (1 - 1 / classes) / 4:
        return f"{owner} cannot be told from chance on {where} ({accuracy!r}): there are too few examples. Add some."
    return f"{owner} is near chance on {where} ({accuracy!r}): {cause}."
