"""A guard in front of a subject, measured at each share of false alarms that the grid asks for."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from unbackdoor._bench.subjects import PlannedCell
from unbackdoor._data.dataset import Dataset
from unbackdoor._guarding.fit import fit_guard
from unbackdoor._guarding.fitted import FittedGuard
from unbackdoor._guarding.measuring import scores_at, unseen
from unbackdoor._models.perplexity import Perplexity
from unbackdoor._registry.entries import Need

UNUSED = 0.5  # share of false alarms of a guard that no share moves


class Helpers(NamedTuple):
    """The second models of a task, which few guards need.

    Args:
        base: makes the model that the subject was tuned from; None if there is none.
        reference: makes the model that rates texts; None if there is none.
    """

    base: Callable[[], nn.Module | None]
    reference: Callable[[], Perplexity | None]


def measure_guard(
    cell: PlannedCell,
    model: nn.Module,
    clean: Dataset,
    test: Dataset,
    attacked_of: Callable[[Dataset], Any],
    helpers: Helpers,
    device: str | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entry `guard` of a cell, and the record of the fitted guard.

    Args:
        cell: of a guard.
        model: of the subject.
        clean: the clean budget.
        test: examples to score on; those that the guard was fitted on are left out.
        attacked_of: puts the trigger on examples; returns None without one.
        helpers: second models.
        device: None uses a GPU if there is one.
    """
    column, task = cell.column, cell.subject.task
    fitted = fit_guard(
        model,
        clean,
        column.value,
        false_alarms=min(column.false_alarms, default=UNUSED),
        base=helpers.base() if column.needs(Need.BASE, unknown=True) else None,
        reference=helpers.reference() if column.needs(Need.REFERENCE, unknown=True) else None,
        max_new_tokens=task.max_new_tokens,
        seed=cell.seed,
        device=device,
        precision=task.precision,
    )
    fresh = unseen(fitted, test)
    guards: dict[float | None, FittedGuard] = {share: fitted.at(share) for share in column.false_alarms}
    guards = guards or {None: fitted}
    scores = scores_at(list(guards.values()), model, fresh, attacked_of(fresh), device=device, precision=task.precision)
    record = fitted.record
    entry = {
        "measure": record["score"]["measure"],
        "fitted_on": record["clean"]["fitted_on"],
        "threshold_on": record["clean"]["threshold_on"],
        "fitting_seconds": record["seconds"],
        "at": [
            {"false_alarms": share, "threshold": guard.threshold, "score": score.to_json()}
            for (share, guard), score in zip(guards.items(), scores, strict=True)
        ],
    }
    return entry, record
