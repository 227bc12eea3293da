"""Sign-elected merges on disk: `merging.sign_elected` of tensors of which only pieces are in memory."""

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from unbackdoor._mixing.masks import each
from unbackdoor._mixing.merging import elected

_LEVEL = 16  # bits of a magnitude that one pass over a tensor decides
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Cut(NamedTuple):
    """Which numbers of a change stay: the larger ones by magnitude, and of equal ones the first.

    Args:
        level: bits of the magnitude above which a number stays; those of finite numbers are in the order of these.
        equal: for each piece of the tensor, how many of the numbers of that magnitude stay, (pieces,).
    """

    level: int
    equal: list[int]

    def of(self, change: Tensor, index: int) -> Tensor:
        """Returns a piece of the change, flat, with 0 for the numbers that do not stay."""
        bits = _magnitudes(change)
        at = bits == self.level
        return torch.where((bits > self.level) | (at & (at.cumsum(0) <= self.equal[index])), change, 0)


def cut(change: Callable[[int], Tensor], pieces: range, kept: int) -> Cut:
    """Finds the numbers of a change that stay, in a few passes over its pieces.

    Args:
        change: returns a piece of the change, flat, in float32 or float64.
        pieces: numbers of the pieces.
        kept: how many numbers stay.
    """
    equal, level, left = [0] * len(pieces), 0, kept
    if kept == 0:
        return Cut(0 if not equal else torch.iinfo(_magnitudes(change(0)).dtype).max, equal)
    width = 8 * change(0).element_size()
    for shift in range(width - _LEVEL, -1, -_LEVEL):
        counts = _counts(change, pieces, shift, None if shift + _LEVEL == width else level)
        above = counts.flip(0).cumsum(0).flip(0)  # of this size or larger
        part = int((above >= left).nonzero()[-1])
        left -= int(above[part] - counts[part])
        level = (level << _LEVEL) | part

    def tie(index: int) -> None:
        equal[index] = int((_magnitudes(change(index)) == level).sum())

    each(tie, pieces)
    for index, number in enumerate(equal):
        equal[index] = min(number, left)
        left -= equal[index]
    return Cut(level, equal)


def _counts(change: Callable[[int], Tensor], pieces: range, shift: int, level: int | None) -> Tensor:
    """How many magnitudes have each value in the bits from `shift` on, among those with `level` above these bits."""
    counts, adding = torch.zeros(2**_LEVEL, dtype=torch.int64), threading.Lock()

    def count(index: int) -> None:
        bits = _magnitudes(change(index))
        inside = bits if level is None else bits[bits >> (shift + _LEVEL) == level]
        found = torch.bincount((inside >> shift) & (2**_LEVEL - 1), minlength=2**_LEVEL)
        with adding:
            counts.add_(found)

    each(count, pieces)
    return counts


def mix_(out: Tensor, base: Tensor, changes: list[Tensor], cuts: tuple[Cut, Cut], index: int) -> None:
    """Fill `out` with a piece of the merge.

    Args:
        out: is written, in its own type.
        base: the base's numbers, in float32 or float64.
        changes: those of the suspect and of the other model, likewise.
        cuts: for each of these, what `cut` returned for the whole tensor.
        index: number of the piece.
    """
    out.copy_(elected(base, [each.of(change, index) for each, change in zip(cuts, changes, strict=True)]))


def _magnitudes(change: Tensor) -> Tensor:
    """The bits of the magnitudes of numbers, as whole numbers that are in the same order."""
    return change.abs().view(_BITS[change.dtype])
