"""The threshold of a guard, from its scores of clean examples that it was not fitted on."""

import math
from typing import Literal

import torch
from torch import Tensor

from unbackdoor._errors import UnbackdoorError

_ROUNDING = 1e-9  # 0.07 * 100 is a little more than 7


def check_rate(false_alarms: float) -> None:
    """Refuse a rate of false alarms that is not a share."""
    if isinstance(false_alarms, bool) or not isinstance(false_alarms, int | float) or not 0 < false_alarms < 1:
        raise UnbackdoorError(f"`false_alarms` must be more than 0 and less than 1, got {false_alarms!r}.")


def needed(false_alarms: float) -> int:
    """The smallest number of clean examples, halved into those to fit on and those to set the threshold on.

    >>> needed(0.01), needed(0.05), needed(0.1)
    (197, 37, 17)
    """
    return 2 * math.ceil(1 / false_alarms - 1 - _ROUNDING) - 1


def check_enough(count: int, false_alarms: float, where: str) -> None:
    """Refuse fewer clean examples than the rate of false alarms needs; says how many it needs."""
    least = needed(false_alarms)
    if count < least:
        reached = 1 / (count - count // 2 + 1)
        rounding = 10 ** max(math.ceil(-math.log10(reached)), 2)
        other = f", or take `false_alarms={math.ceil(reached * rounding - _ROUNDING) / rounding:g}`" if count else ""
        raise UnbackdoorError(
            f"fit_guard needs at least {least:,} clean examples for a share of false alarms of {false_alarms:g}, since "
            f"half of them set the threshold; {where} has {count:,}. Add clean examples{other}."
        )


def threshold_of(scores: Tensor, false_alarms: float, suspicious: Literal["low", "high"]) -> float:
    """The threshold beyond which a clean example falls with a probability of at most `false_alarms`.

    With n examples, r = floor(false_alarms (n + 1)): the r-th most suspicious score. Another clean example is more
    suspicious than that one with a probability of at most r / (n + 1), whatever the distribution of the scores is, as
    its rank among all n + 1 is uniform.

    Args:
        scores: of clean examples, (n,); at least `needed` in the half.
        false_alarms: share of clean examples, in (0, 1).
        suspicious: which scores raise an alarm.
    """
    rank = math.floor(false_alarms * (len(scores) + 1) + _ROUNDING)
    ordered = scores.double().sort(descending=suspicious == "high").values
    return float(ordered[rank - 1])


def alarms(scores: Tensor, threshold: float | None, suspicious: Literal["low", "high", "all"]) -> Tensor:
    """Which scores lie beyond the threshold, (n,), bool."""
    if suspicious == "all" or threshold is None:
        return torch.ones_like(scores, dtype=torch.bool)
    return scores > threshold if suspicious == "high" else scores < threshold
