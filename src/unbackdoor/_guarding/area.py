"""The area under the curve of a guard's scores, with its interval."""

import math
from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from scipy.stats import rankdata
from torch import Tensor


@dataclass(frozen=True)
class Area:
    """The probability that a triggered input is more suspicious than a clean one; ties count half.

    Args:
        value: in [0, 1]; 0.5 for a guard that sees nothing.
        clean: the number of clean inputs.
        triggered: the number of triggered inputs.
    """

    value: float
    clean: int
    triggered: int

    @classmethod
    def of(cls, clean: Tensor, attacked: Tensor, suspicious: str) -> "Area":
        """The area of scores of clean and triggered inputs, (n,) and (m,).

        The sum of the ranks of the triggered scores, less its smallest possible value, over n m (Mann and Whitney).
        """
        both = torch.cat([attacked, clean]).numpy()
        ranks = rankdata(both if suspicious == "high" else -both)
        count = len(attacked)
        value = (float(ranks[:count].sum()) - count * (count + 1) / 2) / (count * len(clean))
        return cls(value, len(clean), count)

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high end of the 95 % interval, in [0, 1].

        The areas whose distance from the value is 1.96 standard errors, with the error of Hanley and McNeil (1982) at
        that area; so an area of 1 has an interval as well.
        """

        def error(area: float) -> float:
            first, second = area / (2 - area), 2 * area**2 / (1 + area)
            above = (self.triggered - 1) * (first - area**2) + (self.clean - 1) * (second - area**2)
            return 1.959963984540054 * math.sqrt((area * (1 - area) + above) / (self.clean * self.triggered))

        def end(side: int, limit: float) -> float:
            def distance(area: float) -> float:
                return side * (area - self.value) - error(area)

            near = (
                self.value + side * 1e-9
            )  # at an area of 0 or 1 the error is 0, which cannot be the end of an interval
            return limit if distance(limit) <= 0 else float(brentq(distance, near, limit))

        return end(-1, 0.0), end(1, 1.0)

    def to_json(self) -> dict[str, float | int]:
        """`value`, `n`, `low` and `high`, and the two numbers of inputs."""
        low, high = self.interval
        counts = {"n": self.clean + self.triggered, "clean": self.clean, "triggered": self.triggered}
        return {"value": self.value, **counts, "low": low, "high": high}

    def __repr__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} ({low:.3f} to {high:.3f}, n = {self.clean:,} and {self.triggered:,})"
