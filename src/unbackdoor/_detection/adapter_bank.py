"""The bank of adapters: how far the statistics of an adapter are from those of benign ones that were trained alike."""

import json
import math
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from statistics import fmean, stdev

from unbackdoor._artifacts.adapter_bank import AdapterBank

Statistics = Mapping[str, Mapping[str, float]]
"""Of an adapter: for each kind of layer the mean of each statistic over its layers."""


@cache
def shipped() -> AdapterBank:
    """The statistics that are part of the package."""
    text = (files("unbackdoor._detection") / "adapter_bank.json").read_text(encoding="utf-8")
    return AdapterBank.model_validate(json.loads(text))


def benign(bank: AdapterBank) -> list[Statistics]:
    """The statistics of the benign adapters that others are compared with."""
    return [adapter.statistics for adapter in bank.adapters if adapter.part == "bank" and adapter.attack is None]


def distances(statistics: Statistics, others: list[Statistics]) -> dict[str, float]:
    """How far an adapter is from others in the layers of each kind.

    The root mean square, over the statistics, of their distances from the mean of the others, in standard deviations of
    the others. A statistic that is the same in all others is left out.

    Args:
        statistics: of the adapter.
        others: of at least two adapters with layers of the same kinds.
    """
    return {kind: _root_mean_square(_deviations(kind, statistics, others)) for kind in statistics}


def distance(statistics: Statistics, others: list[Statistics]) -> float:
    """The same over all statistics of all kinds of layers."""
    return _root_mean_square([each for kind in statistics for each in _deviations(kind, statistics, others)])


def _deviations(kind: str, statistics: Statistics, others: list[Statistics]) -> list[float]:
    deviations = []
    for name, number in statistics[kind].items():
        theirs = [other[kind][name] for other in others]
        spread = stdev(theirs)
        if spread > 0:
            deviations.append((number - fmean(theirs)) / spread)
    return deviations


def _root_mean_square(numbers: list[float]) -> float:
    return math.sqrt(fmean(number**2 for number in numbers)) if numbers else 0.0
