"""Splits of a data set: the rows of each part."""

import numpy as np
from torch import Tensor

from unbackdoor._errors import UnbackdoorError


def stratified(labels: Tensor, count: int, *, seed: int, groups: Tensor | None = None) -> np.ndarray:
    """Returns the rows of a stratified draw, sorted: each class has its share of `count`, by largest remainder.

    With groups, whole groups are drawn class by class until the class's share is reached, so the count may differ. The
    last group of a class is never drawn, so that the rest also has that class.

    Raises:
        UnbackdoorError: there are not enough rows, or only one group per class.
    """
    if not 0 < count < len(labels):
        allowed = f"1 to {len(labels) - 1:,} of {len(labels):,} examples" if len(labels) > 1 else "part of 2 or more"
        raise UnbackdoorError(f"A part of the data must hold {allowed}, got {count:,}. Take more data.")
    random = np.random.default_rng(seed)
    label = labels.cpu().numpy()
    kinds, sizes = np.unique(label, return_counts=True)
    share, remainder = np.divmod(sizes * count, len(label))
    share[np.argsort(-remainder, kind="stable")[: count - share.sum()]] += 1
    chosen: list[np.ndarray] = []
    for kind, quota in zip(kinds, share, strict=True):
        rows = np.flatnonzero(label == kind)
        if groups is None:
            chosen.append(random.permutation(rows)[:quota])
            continue
        owner = groups.cpu().numpy()[rows]
        drawn = 0
        for group in random.permutation(np.unique(owner))[:-1]:
            if drawn >= quota:
                break
            chosen.append(rows[owner == group])
            drawn += len(chosen[-1])
    if not chosen:
        raise UnbackdoorError("`group` puts each class into one group, so none can be held out. Give `test` instead.")
    return np.sort(np.concatenate(chosen))
