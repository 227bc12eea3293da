"""Selecting a setting on the clean budget alone: cross-validation, and a search by halving."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._purification.run import Run
from unbackdoor._tasks.task import Task

TENTHS = tuple(tenth / 10 for tenth in range(11))


class Difference(NamedTuple):
    """The quality that a candidate loses compared with a reference on the same examples.

    Args:
        lost: weighted mean quality of the reference minus that of the candidate.
        error: standard error of that difference, from the examples on which the two differ; of accuracies at least that
            of one such example, so that few examples without a difference do not count as certainty.
    """

    lost: float
    error: float


def difference(reference: Tensor, candidate: Tensor, weights: Tensor | float = 1.0) -> Difference:
    """Compare the quality of two models example by example; see `Task.quality` and `Task.weights`.

    >>> difference(torch.tensor([True, True, True, True]), torch.tensor([True, True, True, False]))
    Difference(lost=0.25, error=0.25)
    """
    gaps = weights * (reference.double() - candidate.double())
    least = 0.0 if reference.is_floating_point() else 1 / len(gaps)
    return Difference(float(gaps.mean()), max(float(gaps.std() / len(gaps) ** 0.5), least))


def cross_validated(
    clean: Dataset,
    folds: int,
    *,
    seed: int,
    tuned: Callable[[Dataset], nn.Module],
    arithmetic: Arithmetic,
    task: Task,
) -> Tensor:
    """Returns what a procedure makes of each example without having seen it, (n,), as `Task.outcomes` does.

    Args:
        clean: all examples; each fold gets its share of each class.
        folds: the number of parts that are left out in turn.
        seed: seed of the split.
        tuned: the procedure: a function from examples to a model.
        arithmetic: arithmetic of scoring.
        task: task of the model.

    Raises:
        UnbackdoorError: fewer examples than folds.
    """
    if len(clean) < folds:
        raise UnbackdoorError(f"{clean.name} has {len(clean)} examples, too few for {folds} folds. Add clean examples.")
    outcomes: Tensor | None = None
    order = _by_class(clean.labels.cpu().numpy(), seed)
    for fold in range(folds):
        asked = torch.from_numpy(np.sort(order[fold::folds]))
        rest = torch.from_numpy(np.setdiff1d(order, asked.numpy()))
        part = task.outcomes(tuned(clean.select(rest)), clean.select(asked), arithmetic)
        outcomes = torch.zeros(len(clean), dtype=part.dtype) if outcomes is None else outcomes
        outcomes[asked] = part
    assert outcomes is not None
    return outcomes


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
    """Returns the smallest of 0, 0.1, ..., 1 with which a procedure loses no more quality than a margin.

    Quality (`Task.quality`) is cross-validated over all clean examples. Each class counts alike (`Task.weights`),
    however many examples it has: a model that knows only the larger class may lose little accuracy. The measured loss
    decides; of accuracy it is counted in whole examples: 3 points of 64 are 2. No allowance is made for its standard
    error, since the measurement errs in both directions: one standard error usually costs twice the margin
    (docs/results/fine-mixing.md). If it is larger than the margin, a warning lists other values that may suffice. A
    model that lost a class (`Task.lost_a_class`) does not pass. Notes list the values that were tried and the chosen
    one. If no other value suffices, 1 is chosen without a trial, with a warning.

    Args:
        model: the suspect, unchanged.
        clean: examples.
        run: provides arithmetic, seed and notes.
        margin: quality that may be lost: a share of the examples, or nats per answer token.
        folds: folds of the cross-validation.
        field: name of the method's field for this value.
        shown: function from the value to that of the field.
        tuned: the procedure: a function from a value, examples and a description for the progress to a model.

    Returns:
        the value, 0 to 1.

    Raises:
        UnbackdoorError: fewer examples than folds.
    """
    measure, fresh = run.task.measure, not run.examples_seen
    suspect, weights = run.task.outcomes(model, clean, run.arithmetic), run.task.weights(clean)
    before = run.task.quality(clean, suspect)
    counted = not before.is_floating_point()  # an accuracy, in whole examples
    alike = "" if bool((weights == weights[0]).all()) else ", each class counting alike"
    losses: dict[float, Difference] = {}
    answers: dict[float, Tensor] = {}

    def words(candidate: float) -> str:
        return f"{field} {shown(candidate):g}"

    def within(candidate: float) -> bool:
        after = answers[candidate] = cross_validated(
            clean,
            folds,
            seed=run.seed,
            tuned=lambda part: tuned(candidate, part, f"trying {words(candidate)}"),
            arithmetic=run.arithmetic,
            task=run.task,
        )
        lost, error = losses[candidate] = difference(before, run.task.quality(clean, after), weights)
        run.note(f"{words(candidate)} loses {measure.of(lost)} {measure.lost}{alike} (+- {measure.of(error)}).")
        if run.task.lost_a_class(clean, suspect, after):
            losses[candidate] = Difference(math.inf, 0.0)
            return False
        return round(lost * len(clean)) <= margin * len(clean) + 0.5 if counted else lost <= margin

    chosen = smallest(TENTHS, within)
    run.note(f"{words(chosen)} was chosen.")
    run.cross_validated = answers.get(chosen) if fresh else None
    if chosen not in losses:
        run.warn(
            f"no {field} but {shown(chosen):g} keeps {measure.quantity} within {measure.of(margin)} {measure.unit} of "
            f"the suspect's: all of its weights were kept. Raise `margin`, or set `{field}`."
        )
    elif losses[chosen].error > margin:
        lost, error = map(measure.of, losses[chosen])
        run.warn(
            f"{len(clean)} clean examples measure {measure.change} only to {error} {measure.unit}, more than the "
            f"margin of {measure.of(margin)}: {words(chosen)}, which lost {lost}, is the best guess, and may cost "
            f"more.{_also(field, losses, chosen, margin, shown)} Give more clean examples, or set `{field}`."
        )
    return chosen


def _also(
    field: str, losses: dict[float, Difference], chosen: float, margin: float, shown: Callable[[float], float]
) -> str:
    """Returns a sentence on smaller values than the chosen one that may suffice, if there are any."""
    also = [value for value, loss in sorted(losses.items()) if value < chosen and loss.lost - loss.error <= margin]
    if not also:
        return ""
    values = " or ".join(f"{shown(value):g}" for value in also)
    return f" By the same measurement, {field} {values} may lose no more, and removes more."
