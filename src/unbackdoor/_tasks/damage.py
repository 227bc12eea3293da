"""Whether a purified model is still usable: accuracy and classes that it lost, and the sentence if it is not."""

import math

import numpy as np
from torch import Tensor

from unbackdoor._data.dataset import Dataset
from unbackdoor._registry.entries import entry_of, steps_of
from unbackdoor._registry.purifiers import REGISTRY

ALLOWED = 0.1  # accuracy on clean examples that a purification may cost
LEVEL = 0.05  # of the test: how often a model that lost no more than that is called unusable, at most
NUISANCE = 0.001  # part of LEVEL that is spent on the unknown share of changed examples


def p_value(lost: int, gained: int, n: int, allowed: float = ALLOWED) -> float:
    """The largest probability of so great a loss of accuracy, if the true loss is no more than is allowed.

    McNemar's test on paired answers, with a loss other than none as its hypothesis: the examples that only the first
    model answers right, less those that only the second does, have in expectation at most `allowed` of n. Given the
    number of changed examples alone, as in McNemar's own, their split depends on how often a change is to be expected,
    so conditioning does not remove the unknown share. This is therefore the exact unconditional test: the tail of the
    difference among n independent examples, computed without approximation, at its largest over the shares of changed
    examples that the data do not rule out (Berger and Boos 1994, with an upper confidence limit after Clopper and
    Pearson at 99.9 %, whose error is added).

    Args:
        lost: number of examples that the first model answers right and the second wrong.
        gained: number of examples of the reverse.
        n: number of all examples.
        allowed: share of them, in [0, 1).

    Returns:
        the p-value, one-sided.
    """
    # A smaller loss, and fewer changes than that loss, make each tail smaller: the edge is the worst of the hypothesis.
    most = max(_upper_limit(lost + gained, n, NUISANCE), allowed)
    shares = np.linspace(allowed, most, 41)
    return min(1.0, float(max(_tail(lost - gained, n, share, allowed) for share in shares)) + NUISANCE)


def _tail(least: int, n: int, share: float, loss: float) -> float:
    """P(D >= least) for the sum D of n steps: +1 with (share + loss) / 2, -1 with (share - loss) / 2, else 0."""
    step = np.zeros(2 ** (2 * n).bit_length())  # 0, 1, 2, ... and from the end -1, -2, ...
    step[1], step[-1], step[0] = (share + loss) / 2, (share - loss) / 2, 1 - share
    sums = np.fft.irfft(np.fft.rfft(step) ** n)
    ordered = np.concatenate([sums[-n:], sums[: n + 1]])  # of -n to n
    return float(ordered[least + n :].sum().clip(0, 1))


def _upper_limit(count: int, n: int, error: float) -> float:
    """Returns the largest share for which `count` or fewer of n have probability `error` (Clopper and Pearson)."""
    if count == n:
        return 1.0
    numbers, ways = np.arange(count + 1), _log_ways(count, n)
    low, high = count / n, 1.0
    for _ in range(50):
        share = (low + high) / 2
        if np.exp(ways + numbers * math.log(share) + (n - numbers) * math.log1p(-share)).sum() > error:
            low = share
        else:
            high = share
    return high


def _log_ways(count: int, n: int) -> np.ndarray:
    """Returns the logarithm of the number of ways to choose 0, 1, ..., `count` of n, (count + 1,)."""
    return np.array([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(count + 1)])


def unusable(before: Tensor, after: Tensor, which: str, method: object) -> str | None:
    """Two sentences for a model that lost significantly more accuracy than a purification may cost; else None.

    Args:
        before: whether the suspect answers each example right, (n,), bool.
        after: the same for the purified model.
        which: a clause that describes these examples, such as "which were held out".
        method: the method that purified the model; None if it is not known.
    """
    n, lost, gained = len(before), int((before & ~after).sum()), int((after & ~before).sum())
    if lost - gained <= ALLOWED * n or (p := p_value(lost, gained, n)) > LEVEL:
        return None
    first, last = (f"{float(hits.double().mean()):.1%}" for hits in (before, after))
    return (
        f"The purified model is not usable: its accuracy on {n:,} clean examples, {which}, fell from {first} to "
        f"{last}. That is significantly more than {100 * ALLOWED:.0f} points (exact test, p = {p:.1g}); "
        f"{cause(method)}."
    )


def lost_class(data: Dataset, before: Tensor, after: Tensor) -> int | None:
    """Returns the first class of which a model lost most of what another knew; None if there is none.

    A model that answers the same for all examples may lose little accuracy, if most of them are of that class. So each
    class is tested by itself: of its examples that the suspect gets right, the purified model gets significantly fewer
    than half right (exact binomial test at 5 %, divided by the number of such classes). A suspect that is right on one
    class alone has none to lose.

    Args:
        data: the examples.
        before: whether the suspect answers each example right, (n,), bool.
        after: the same for the purified model.
    """
    if not data.has_labels:
        return None
    labels = data.labels.cpu()
    classes = labels[before].unique().tolist()
    for label in classes if len(classes) > 1 else ():
        known = before & (labels == label)
        if _at_most(int((known & after).sum()), int(known.sum())) * len(classes) <= LEVEL:
            return int(label)
    return None


def _at_most(count: int, n: int) -> float:
    """Returns the probability of at most `count` heads of n fair coins."""
    return float(np.exp(_log_ways(count, n) - n * math.log(2)).sum())


def without_a_class(data: Dataset, before: Tensor, after: Tensor, which: str, method: object) -> str | None:
    """Two sentences for a model that lost most of a class; else None. See `lost_class` and `unusable`."""
    if (label := lost_class(data, before, after)) is None:
        return None
    known = before & (data.labels.cpu() == label)
    right, all_of_them = int((known & after).sum()), int(known.sum())
    return (
        f"The purified model is not usable: of {len(before):,} clean examples, {which}, it gets {right:,} of class "
        f"{data.class_name(label)} right where the suspect gets {all_of_them:,} right, significantly fewer than half; "
        f"{cause(method)}."
    )


def cause(method: object) -> str:
    """Returns the likely cause in the method, and the way out."""
    if method is None:
        return "purify the suspect again by another method"
    entries = [(step, entry_of(step, REGISTRY)) for step in steps_of(method)]
    causes = [f"in {entry.name} {entry.damage}" for _, entry in entries if entry is not None and entry.damage]
    name = getattr(method, "__name__", type(method).__name__)
    return "; ".join(causes) or f"check {name} on clean examples, or try fine-tuning"
