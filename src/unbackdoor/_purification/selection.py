"""Selecting a setting on the clean budget alone: cross-validation, and a search by halving."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._purification.run import Run
from unbackdoor._tasks.classification import hits

TENTHS = tuple(tenth / 10 for tenth in range(11))


class Difference(NamedTuple):
    """The accuracy that a candidate loses compared with a reference on the same examples.

    Args:
        lost: accuracy of the reference minus that of the candidate.
        error: standard error of that difference, from the examples on which the two differ; at least that of one such
            example, so that few examples without a difference do not count as certainty.
    """

    lost: float
    error: float


def difference(reference: Tensor, candidate: Tensor) -> Difference:
    """Compare two models example by example.

    >>> difference(torch.tensor([True, True, True, True]), torch.tensor([True, True, True, False]))
    Difference(lost=0.25, error=0.25)
    """
    gaps = reference.double() - candidate.double()
    return Difference(float(gaps.mean()), max(float(gaps.std() / len(gaps) ** 0.5), 1 / len(gaps)))


def cross_validated(
    clean: Dataset, folds: int, *, seed: int, tuned: Callable[[Dataset], nn.Module], arithmetic: Arithmetic
) -> Tensor:
    """Returns which examples a procedure classifies as labelled without having seen them, (n,), bool.

    Args:
        clean: all examples; each fold gets its share of each class.
        folds: the number of parts that are left out in turn.
        seed: seed of the split.
        tuned: the procedure: a function from examples to a model.
        arithmetic: arithmetic of scoring.

    Raises:
        UnbackdoorError: fewer examples than folds.
    """
    if len(clean) < folds:
        raise UnbackdoorError(f"{clean.name} has {len(clean)} examples, too few for {folds} folds. Add clean examples.")
    right = torch.zeros(len(clean), dtype=torch.bool)
    order = _by_class(clean.labels.cpu().numpy(), seed)
    for fold in range(folds):
        asked = torch.from_numpy(np.sort(order[fold::folds]))
        rest = torch.from_numpy(np.setdiff1d(order, asked.numpy()))
        right[asked] = hits(tuned(clean.select(rest)), clean.select(asked), arithmetic)
    return right


def _by_class(labels: np.ndarray, seed: int) -> np.ndarray:
    """Returns row numbers, class after class, each class shuffled."""
    random = np.random.default_rng(seed)
    return np.concatenate([random.permutation(np.flatnonzero(labels == kind)) for kind in np.unique(labels)])


def smallest(grid: Sequence[float], passes: Callable[[float], bool]) -> float:
    """Returns the smallest value of a rising grid that passes, found by halving; the last one is assumed to pass.

    >>> smallest([0.0, 0.25, 0.5, 0.75, 1.0], lambda candidate: candidate >= 0.4)
    0.5
    """
    low, high = 0, len(grid) - 1
    while low < high:
        middle = (low + high) // 2
        if passes(grid[middle]):
            high = middle
        else:
            low = middle + 1
    return grid[low]


def smallest_within(
    model: nn.Module,
    clean: Dataset,
    run: Run,
    *,
    margin: float,
    folds: int,
    field: str,
    shown: Callable[[float], float] = float,
    tuned: Callable[[float, Dataset, str], nn.Module],
) -> float:
    """Returns the smallest of 0, 0.1, ..., 1 with which a procedure loses no more accuracy than a margin.

    Accuracy is cross-validated over all clean examples. The measured loss decides, counted in whole examples: 3 points
    of 64 are 2. No allowance is made for its standard error, since the measurement errs in both directions: an
    allowance of one standard error would usually cost twice the margin (docs/results/fine-mixing.md). If that error is
    larger than the margin, a warning lists other values that may suffice. Notes list the values that were tried and the
    chosen one. If no other value suffices, 1 is chosen without a trial, with a warning.

    Args:
        model: the suspect, unchanged.
        clean: examples.
        run: provides arithmetic, seed and notes.
        margin: accuracy that may be lost.
        folds: folds of the cross-validation.
        field: name of the method's field for this value.
        shown: function from the value to that of the field.
        tuned: the procedure: a function from a value, examples and a description for the progress to a model.

    Returns:
        the value, 0 to 1.

    Raises:
        UnbackdoorError: fewer examples than folds.
    """
    before, fresh = run.task.outcomes(model, clean, run.arithmetic), not run.examples_seen
    losses: dict[float, Difference] = {}
    answers: dict[float, Tensor] = {}

    def words(candidate: float) -> str:
        return f"{field} {shown(candidate):g}"

    def within(candidate: float) -> bool:
        after = cross_validated(
            clean,
            folds,
            seed=run.seed,
            tuned=lambda part: tuned(candidate, part, f"trying {words(candidate)}"),
            arithmetic=run.arithmetic,
        )
        answers[candidate] = after
        lost, error = losses[candidate] = difference(before, after)
        run.note(f"{words(candidate)} loses {100 * lost:.1f} points of accuracy (+- {100 * error:.1f}).")
        return round(lost * len(clean)) <= margin * len(clean) + 0.5

    chosen = smallest(TENTHS, within)
    run.note(f"{words(chosen)} was chosen.")
    run.cross_validated = answers.get(chosen) if fresh else None
    if chosen not in losses:
        run.warn(
            f"no {field} but {shown(chosen):g} keeps clean accuracy within {100 * margin:.1f} points of the suspect's: "
            f"all of its weights were kept. Raise `margin`, or set `{field}`."
        )
    elif losses[chosen].error > margin:
        lost, error = losses[chosen]
        safer = [value for value, loss in sorted(losses.items()) if value < chosen and loss.lost - loss.error <= margin]
        others = ""
        if safer:
            named = " or ".join(f"{shown(value):g}" for value in safer)
            others = f" By the same measurement, {field} {named} may lose no more, and removes more."
        run.warn(
            f"{len(clean)} clean examples measure a loss of accuracy only to {100 * error:.1f} points, more than the "
            f"margin of {100 * margin:.1f}: {words(chosen)}, which lost {100 * lost:.1f}, is the best guess, and may "
            f"cost more.{others} Give more clean examples, or set `{field}`."
        )
    return chosen
