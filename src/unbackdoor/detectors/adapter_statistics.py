"""Adapter statistics: whether the matrices of a LoRA adapter are unlike those of benign adapters."""

from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean

from torch import Tensor, nn

from unbackdoor._artifacts.adapter_bank import AdapterBank, Shape
from unbackdoor._data.dataset import Dataset
from unbackdoor._detection import adapter_bank
from unbackdoor._detection.finding import Candidate, Finding
from unbackdoor._errors import UnbackdoorError, few, printable
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.detectors._change_statistics import STATISTICS, kind_of, statistics_of

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Of each adapted layer the columns, (outputs, rank), with the scale in them, and the rows, (rank, inputs)."""


@value
class AdapterStatistics:
    """Compare the matrices of a LoRA adapter with those of benign adapters that were trained in one way.

    The change of each layer is described by five numbers: its largest singular value, its norm, the share of its
    energy in the first direction, the entropy of these shares, and the kurtosis of its entries. For each kind of layer
    they are averaged over the blocks. The result is a hint: how many standard deviations the adapter is from the benign
    ones of the bank, as a root mean square over all numbers, and how many adapters of a test, benign and backdoored,
    are as far. It never changes the verdict, and it has no p-value.

    Sun et al., "PEFTGuard: Detecting Backdoor Attacks Against
    Parameter-Efficient Fine-Tuning", IEEE S&P 2025, https://arxiv.org/abs/2411.17453, ask this question; the numbers
    are those of "Weight space Detection of Backdoors in LoRA Adapters", https://arxiv.org/abs/2602.15195.

    Cannot see: anything in adapters that were trained otherwise than those of the bank. Other ranks, layers and bases
    are refused; other data, learning rates and numbers of steps do not show, and make a benign adapter as strange as a
    backdoored one.

    Differences from the paper: PEFTGuard trains a network of two billion weights for each base model and each set of
    layers, which is not done here. The second paper compares query, key, value and output of language models.
    """

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> Finding:
        """Compare the adapter with the bank."""
        if not run.adapter:
            raise UnbackdoorError(
                "AdapterStatistics needs a suspect that is a LoRA adapter. Give it without merging it."
            )
        bank = adapter_bank.shipped()
        arch = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        difference = difference_from(bank, str(arch), run.adapter)
        if difference is not None:
            return Finding(
                candidates=(),
                note=f"{difference}, and the statistics of adapters that were trained in another way say nothing",
            )
        others = adapter_bank.benign(bank)
        statistics = statistics_by_kind(run.adapter)
        by_kind = sorted(adapter_bank.distances(statistics, others).items(), key=lambda pair: -pair[1])
        candidates = [
            Candidate(target=place, name=kind, strength=size, size=size, nominal_p=1.0)
            for place, (kind, size) in enumerate(by_kind)
        ]
        return Finding(
            candidates=tuple(candidates),
            unit="standard deviations from benign adapters",
            note=hint(bank, adapter_bank.distance(statistics, others)),
            targets="layer",
        )


def statistics_by_kind(factors: Factors) -> dict[str, dict[str, float]]:
    """For each kind of layer the mean of each statistic over its layers."""
    by_kind: dict[str, list[dict[str, float]]] = defaultdict(list)
    for layer, (columns, rows) in factors.items():
        by_kind[kind_of(layer)].append(statistics_of(columns, rows))
    return {
        kind: {name: fmean(each[name] for each in by_kind[kind]) for name in STATISTICS} for kind in sorted(by_kind)
    }


def shapes_by_kind(factors: Factors) -> dict[str, Shape]:
    """For each kind of layer how many there are, and their sides; of the first if they differ."""
    kinds: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for layer, pair in factors.items():
        kinds[kind_of(layer)].append(pair)
    return {
        kind: Shape(layers=len(pairs), outputs=len(pairs[0][0]), inputs=pairs[0][1].shape[1])
        for kind, pairs in sorted(kinds.items())
    }


def difference_from(bank: AdapterBank, arch: str, factors: Factors) -> str | None:
    """How an adapter differs from those of the bank in what can be seen of its training; None if it does not."""
    if arch != bank.arch:
        return f"the adapter is of a {printable(arch)} model, and those of the bank are of {bank.arch} models"
    ranks = sorted({len(rows) for _, rows in factors.values()})
    if ranks != [bank.rank]:
        return f"the adapter has rank {few(list(map(str, ranks)))}, and those of the bank have rank {bank.rank}"
    shapes = shapes_by_kind(factors)
    differing = sorted(kind for kind in {*shapes, *bank.layers} if shapes.get(kind) != bank.layers.get(kind))
    if differing:
        return f"the adapter and those of the bank do not change the same layers ({few(differing)})"
    return None


def hint(bank: AdapterBank, distance: float) -> str:
    """The sentences for the user."""
    others = adapter_bank.benign(bank)
    tested = [adapter for adapter in bank.adapters if adapter.part == "test"]
    counts = []
    for name, group in (
        ("benign", [each for each in tested if each.attack is None]),
        ("backdoored", [each for each in tested if each.attack is not None]),
    ):
        as_far = sum(adapter_bank.distance(each.statistics, others) >= distance for each in group)
        counts.append(f"{as_far} of {len(group)} {name}")
    area = bank.area
    return (
        f"Hint, not a verdict: the matrices of this adapter are {distance:.1f} standard deviations from those of "
        f"{len(others)} benign adapters. In a test, {counts[0]} and {counts[1]} ones were as far or farther (AUC "
        f"{area.value:.2f}, 95 % interval {area.low:.2f} to {area.high:.2f}). This holds only for adapters trained as "
        f"those were: {bank.trained}"
    )
