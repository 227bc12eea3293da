"""From a grid to its cells, and to those that still have to be measured."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from unbackdoor._bench.columns import columns_of
from unbackdoor._bench.fitting import check_columns
from unbackdoor._bench.grid import NOTHING, Grid
from unbackdoor._bench.schema import Cells
from unbackdoor._bench.store import Store
from unbackdoor._bench.subjects import PlannedCell, Subject, Subjects, cell_of
from unbackdoor._errors import UnbackdoorError


@dataclass(frozen=True)
class Plan:
    """The work that is to be done.

    Args:
        victims: victims to train, in order.
        cells: cells to measure, in order.
        total: number of cells of the grid.
        forced: keys of cells that are measured although they have a result.
        surrogates: by the key of a victim, the clean control that its attack perturbs pictures against.
    """

    victims: tuple[Subject, ...]
    cells: tuple[PlannedCell, ...]
    total: int
    forced: frozenset[str]
    surrogates: dict[str, Subject]


def plan(grid: Grid, store: Store, rerun: str, only: tuple[str, ...] = ()) -> Plan:
    """Returns the part of a grid that is still to be done.

    Args:
        grid: checked.
        store: the store with its present results.
        rerun: `missing` takes cells without any result, `failed` also those that failed, `all` all, `none` none.
        only: keys of cells; no others are measured.

    Raises:
        UnbackdoorError: a needed victim was changed since its training, or `only` names a cell that the grid lacks.
    """
    cells = all_cells(grid)
    strange = set(only) - {cell.key for cell in cells}
    if strange:
        raise UnbackdoorError(f"`only` must be the key of a cell of {grid.path}, got {sorted(strange)[0]}.")
    done, failed, trained = store.done(), store.failed(), store.victims()
    known = done | failed
    chosen = [cell for cell in cells if not only or cell.key in only]
    wanted = {
        cell.key
        for cell in chosen
        if rerun == "all"
        or (rerun in ("missing", "failed") and cell.key not in known)
        or (rerun == "failed" and cell.key in failed)
    }
    to_train: dict[Subject, None] = {}
    surrogates: dict[str, Subject] = {}

    def need(subject: Subject) -> None:
        if subject.model is not None or subject.key in trained or subject in to_train:
            return
        surrogate = _surrogate_of(subject, cells)
        if surrogate is not None:
            need(surrogate)
            surrogates[subject.key] = surrogate
        to_train[subject] = None

    for cell in cells:
        for subject in cell.needs if cell.key in wanted else ():
            need(subject)
    if rerun in ("missing", "failed"):
        present = trained | {subject.key for subject in to_train}
        for cell in chosen:
            # A finished control is measured again if the grid got new victims since.
            if cell.key in done and lacks_flips(cell, store.get(cell.spec) or {}, present):
                wanted.add(cell.key)
                need(cell.subject)
    pending = tuple(cell for cell in cells if cell.key in wanted)
    if store.place.near:
        for key in {subject.key for cell in pending for subject in cell.needs} & trained:
            store.victim(key)
    return Plan(tuple(to_train), pending, len(cells), frozenset(wanted & known), surrogates)


def lacks_flips(cell: PlannedCell, result: dict[str, Any], victims: set[str]) -> bool:
    """Whether the result of a control lacks how often it flips on the trigger of a victim of the grid.

    Args:
        cell: any cell.
        result: of it.
        victims: keys of those that are in the store, or will be.
    """
    expected = {other.key for other in cell.others if other.model is not None or other.key in victims}
    return bool(expected - set(result.get("flips") or {}))


def _surrogate_of(subject: Subject, cells: list[PlannedCell]) -> Subject | None:
    """Returns the clean control that an attack perturbs pictures against, if it needs one and the grid has it."""
    from unbackdoor._poisoning.abilities import needs_surrogate

    if not needs_surrogate(subject.attack):
        return None
    subjects = (cell.subject for cell in cells if cell.subject.control and cell.subject.name == subject.name)
    return next((control for control in subjects if control.seed == subject.seed), None)


def all_cells(grid: Grid) -> list[PlannedCell]:
    """Returns all cells of a grid, victim by victim, each once.

    Raises:
        UnbackdoorError: the `attack.json` of an existing model cannot be used.
    """
    from unbackdoor.purifiers import FineTuning as fine_tuning

    makes = Subjects(grid)
    columns = columns_of(grid)
    baselines = [label for label, column in columns.items() if isinstance(column.value, fine_tuning)]
    combinations: dict[tuple[Subject, str, int | None, int], None] = {}

    def add(entry: Cells) -> None:
        subjects = [s for s in makes.of(entry) if s.control or not entry.attack or s.label in entry.attack]
        for subject, (label, column) in itertools.product(subjects, columns.items()):
            if label == NOTHING:
                combinations[subject, label, None, 0] = None
            elif not entry.method or label in entry.method or label in baselines:
                if column.kind == "trainer" and subject.task.poisoned_by_others and subject.control:
                    continue  # its training data are not known
                places: list[int | None] = [*(entry.budget or range(len(grid.budgets)))]
                for place, seed in itertools.product(places, entry.seed or grid.seeds):
                    combinations[subject, label, place if column.takes_clean else None, seed] = None

    add(Cells())
    for entry in grid.cells:
        if entry.leave_out:
            for combination in [each for each in combinations if _matches(entry, *each)]:
                del combinations[combination]
        else:
            add(entry)
    # A victim that no method is run on does not belong in the table.
    purified = {subject for subject, label, _, _ in combinations if label != NOTHING}
    kept = [each for each in combinations if each[0] in purified]
    kept.sort(key=lambda each: makes.order[each[0]])
    victims = {subject for subject, *_ in kept if not subject.control}
    others = {subject: makes.controlled_by(subject, victims) for subject in purified}
    cells: dict[str, PlannedCell] = {}
    for subject, label, place, seed in kept:
        column, budget = columns[label], None if place is None else grid.budgets[place]
        cell = cell_of(subject, column, budget, seed, makes.files[subject.name])
        if column.makes_model or label == NOTHING:
            second = subject.task.second_test is not None and (label == NOTHING or seed == grid.seeds[0])
            cell = dataclasses.replace(cell, others=others[subject], second=second)
        cells.setdefault(cell.key, cell)
    check_columns(list(cells.values()))
    return [_with_surrogate(cell, list(cells.values())) for cell in cells.values()]


def _with_surrogate(cell: PlannedCell, cells: list[PlannedCell]) -> PlannedCell:
    """The cell of a trainer with the clean control by which the poisoned examples are made, if they need one."""
    from unbackdoor._poisoning.abilities import crafts_by_surrogate

    if cell.column.kind != "trainer" or not crafts_by_surrogate(cell.subject.attack):
        return cell
    return dataclasses.replace(cell, surrogate=_surrogate_of(cell.subject, cells))


def _matches(entry: Cells, subject: Subject, label: str, place: int | None, seed: int) -> bool:
    pairs = [
        (entry.task, subject.name),
        (entry.attack, subject.label),
        (entry.rate, subject.rate),
        (entry.victim_seed, subject.seed),
        (entry.method, label),
        (entry.budget, place),
        (entry.seed, None if label == "none" else seed),
    ]
    return all(allowed is None or actual in allowed for allowed, actual in pairs)
