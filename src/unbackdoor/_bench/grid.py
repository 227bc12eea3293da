"""Grid files: TOML into checked values. All problems are listed at once, each with its line."""

import difflib
import hashlib
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from unbackdoor import purifiers
from unbackdoor._bench.lines import Location, line_of, lines_of
from unbackdoor._bench.named import (
    PlannedAttack,
    named_detectors,
    named_guards,
    named_methods,
    named_trainers,
    planned_attacks,
)
from unbackdoor._bench.paths import check_task
from unbackdoor._bench.schema import Cells, File, GridBudget, GridTask, Resources
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import CONFIG, exists, read_text
from unbackdoor._registry.entries import find
from unbackdoor._value import error_sentence

_MOST = 30  # problems of a grid that a message lists

AUDIT = "audit"  # the label of cells that audit
NOTHING = "none"  # the label of cells that score a victim as it came
FALSE_ALARMS = (0.01, 0.05)  # of guards, unless the grid says others

KEPT = "# Relative paths count from "  # the first line of a grid that is kept in a store


def kept(grid: "Grid", store: Path | None) -> tuple[str, str]:
    """The name and the text of the copy that a store keeps, which runs as the grid does.

    Args:
        grid: the grid that is run.
        store: its folder; None if it is not a folder, so that relative paths have no meaning.
    """
    stem = re.sub(r"-[0-9a-f]{8}$", "", grid.path.stem) if grid.path.parent.name == "grids" else grid.path.stem
    name = f"{stem}-{hashlib.sha256(grid.text.encode()).hexdigest()[:8]}.toml"
    if store is None:
        return name, grid.text
    origin = Path(os.path.relpath(grid.folder.resolve(), (store / "grids").resolve())).as_posix()
    return name, f"{KEPT}{origin}\n{grid.text}"


@dataclass(frozen=True)
class Grid:
    """A checked grid. Paths are as this machine finds them, names are values.

    Args:
        path: path of the file.
        folder: folder that its relative paths start from.
        text: text of the file.
    """

    path: Path
    folder: Path
    text: str
    tasks: dict[str, GridTask]
    attacks: tuple[PlannedAttack, ...]
    methods: dict[str, Any]
    detectors: dict[str, Any]
    trainers: dict[str, Any]
    guards: dict[str, Any]
    false_alarms: tuple[float, ...]
    budgets: tuple[GridBudget, ...]
    victim_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cells, ...]
    resources: Resources


class Problems:
    """Collects the problems of a grid file."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.lines = path, lines_of(text)
        self.entries: list[tuple[int, str]] = []

    def add(self, location: Location, message: object) -> None:
        """Note a problem of an entry."""
        entry = (line_of(location, self.lines) or 1, " ".join(str(message).split()))
        if entry not in self.entries:
            self.entries.append(entry)

    def refuse(self) -> None:
        """Raise, if there are any."""
        if self.entries:
            lines = [f"line {line}: {message}" for line, message in sorted(self.entries)]
            if len(lines) == 1:
                raise UnbackdoorError(f"{self.path} has a problem in {lines[0]}")
            more = [f"and {len(lines) - _MOST:,} more"] if len(lines) > _MOST else []
            details = [f"  {detail}" for detail in (*lines[:_MOST], *more)]
            raise UnbackdoorError(f"{self.path} has {len(lines):,} problems:", *details)


def read(path: str | Path) -> Grid:
    """Read and check a grid file.

    Raises:
        UnbackdoorError: lists all problems of the file.
    """
    path = Path(path)
    raw, text = _toml(path)
    folder = path.parent
    if text.startswith(KEPT):
        first, text = text.split("\n", 1)
        folder = folder / first.removeprefix(KEPT)
    problems = Problems(path, text)
    try:
        file = File.model_validate(raw)
        written: dict[str, Any] = {name: getattr(file, name) for name in File.model_fields}
    except ValidationError as problem:
        for error in problem.errors():
            problems.add(tuple(error["loc"]), _schema_sentence(error))
        written = _salvaged(raw)
    tasks = {name: check_task(name, task, folder, problems) for name, task in written["tasks"].items()}
    planned = planned_attacks(written["attacks"], folder, problems)
    methods = named_methods(written["methods"], folder, problems)
    detectors = named_detectors(written["detectors"], folder, problems)
    trainers = named_trainers(written["trainers"], folder, problems)
    guards = named_guards(written["guards"], folder, problems)
    if written["false_alarms"] is not None and not written["guards"]:
        problems.add(("false_alarms",), "false_alarms are shares for guards, and the grid has none. Leave them out.")
    clean = "clean" not in written["without"]
    if clean:
        planned = {"none": PlannedAttack("none", None, (0.0,)), **planned}
    _check_victims(tasks, clean, bool(written["attacks"]), problems)
    if "fine-tuning" not in written["without"]:
        fine_tuning = find("fine-tuning", purifiers.REGISTRY, "purifier", "methods").resolve()
        if not any(isinstance(method, fine_tuning) for method in methods.values()):
            methods = {"fine-tuning": fine_tuning(), **methods}
    _check_labels({"methods": methods, "trainers": trainers, "guards": guards}, bool(detectors), problems)
    _check_budgets(written, tasks, problems)
    given_tasks = raw.get("tasks")
    known = {
        "task": list(given_tasks) if isinstance(given_tasks, dict) else [],
        "attack": [*_labels(written["attacks"]), "none", "own"],
        "method": [
            *(label for kind in ("methods", "trainers", "guards") for label in _labels(written[kind])),
            *(*methods, NOTHING, *([AUDIT] if detectors else [])),
        ],
    }
    _check_filters(written["cells"], known, len(written["budgets"]), problems)
    problems.refuse()
    return Grid(
        path=path,
        folder=folder,
        text=text,
        tasks=tasks,
        attacks=tuple(planned.values()),
        methods=methods,
        detectors=detectors,
        trainers=trainers,
        guards=guards,
        false_alarms=tuple(sorted(set(written["false_alarms"] or FALSE_ALARMS))),
        budgets=tuple(written["budgets"]),
        victim_seeds=written["victim_seeds"],
        seeds=written["seeds"],
        cells=tuple(written["cells"]),
        resources=written["resources"],
    )


def _toml(path: Path) -> tuple[dict[str, Any], str]:
    """Returns the content of a grid file, parsed and as text."""
    try:
        if path.is_dir() or not exists(path):
            what = "is a folder" if path.is_dir() else "does not exist"
            raise UnbackdoorError(f"{path} {what}; GRID is a TOML file. See docs/bench.md.")
        text = read_text(path, CONFIG)
        return tomllib.loads(text), text
    except (ValueError, RecursionError) as problem:  # also of a number of thousands of digits
        raise UnbackdoorError(f"{path} cannot be read as TOML ({printable(problem, 200)}). Repair it.") from None


def _check_labels(columns: dict[str, dict[str, Any]], audits: bool, problems: Problems) -> None:
    """Note labels that two columns have, of whatever kind."""
    taken = {NOTHING: "the victims as they came", **({AUDIT: "the cells that audit"} if audits else {})}
    for kind, values in columns.items():
        for label in values:
            if label in taken:
                one = kind.removesuffix("s")
                problems.add((kind,), f"'{label}' is the label of {taken[label]}. Give the {one} another label.")
        taken |= dict.fromkeys(values, f"one of the {kind}")


def _check_victims(tasks: dict[str, GridTask], clean: bool, attacks: bool, problems: Problems) -> None:
    """Note tasks without a victim, or without a clean control that the grid asks for."""
    for name, task in tasks.items():
        if clean and task.model is not None and task.control is None and task.triggered is None:
            problems.add(
                ("tasks", name, "model"),
                f'tasks.{name}.control must name a clean model for comparison; or say without = ["clean"].',
            )
        if task.model is None and not task.poisoned_by_others and not attacks and not clean:
            problems.add(("tasks", name), f"tasks.{name} has no victim: there is no attack and no clean control.")


def _check_budgets(written: dict[str, Any], tasks: dict[str, GridTask], problems: Problems) -> None:
    """Note budgets that a task cannot provide; cells that are left out need none."""
    for place, budget in enumerate(written["budgets"]):
        if budget is not None:
            whole = [entry for entry in written["cells"] if entry is not None and _takes_whole_budgets(entry)]
            left = {
                name: task
                for name, task in tasks.items()
                if not any(name in (entry.task or tasks) and place in (entry.budget or (place,)) for entry in whole)
            }
            _check_budget(place, budget, left, problems)


def _schema_sentence(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        *owner, name = error["loc"]
        tables = {"tasks": GridTask, "budgets": GridBudget, "cells": Cells, "resources": Resources}
        table: Any = tables.get(str(owner[0]), File) if owner else File
        names = [entry.alias or key for key, entry in table.model_fields.items()]
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f"Did you mean '{close[0]}'?" if close else f"There are {', '.join(names)}."
        return f"{'.'.join(map(str, owner)) or 'The grid'} has no entry '{name}'. {hint}"
    if error["type"] == "missing":
        return f"{where} must be given."
    if error["type"] == "too_short":
        return f"{where} must have at least one entry."
    return error_sentence(error, "grid").removeprefix("grid.")


def _salvaged(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the valid part of a grid with wrong tables, so that its other problems are also found."""
    tasks = raw.get("tasks")
    valid_tasks = (
        {name: _valid_part(GridTask, table) for name, table in tasks.items()} if isinstance(tasks, dict) else {}
    )
    without = raw.get("without")
    return {
        "tasks": {name: task for name, task in valid_tasks.items() if task is not None},
        "attacks": _tables(raw.get("attacks")),
        "methods": _tables(raw.get("methods")),
        "detectors": _tables(raw.get("detectors")),
        "trainers": _tables(raw.get("trainers")),
        "guards": _tables(raw.get("guards")),
        "false_alarms": raw.get("false_alarms"),
        "budgets": [_valid_part(GridBudget, table) for table in _tables(raw.get("budgets"))],
        "cells": [_valid_part(Cells, table) for table in _tables(raw.get("cells"))],
        "without": without if isinstance(without, list) else [],
    }


def _tables(entries: Any) -> list[dict[str, Any]]:
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _valid_part(table: type[BaseModel], entries: Any) -> Any:
    """Returns a table without its wrong entries, which are reported elsewhere; None if it needs them."""
    try:
        return table.model_validate(entries)
    except ValidationError as problem:
        wrong = {error["loc"][0] for error in problem.errors() if error["loc"]}
    kept = {key: entry for key, entry in entries.items() if key not in wrong} if isinstance(entries, dict) else {}
    try:
        return table.model_validate(kept)
    except ValidationError:
        return None


def _labels(tables: list[dict[str, Any]]) -> list[str]:
    return [str(table.get("label", table.get("name"))) for table in tables]


def _takes_whole_budgets(entry: Cells) -> bool:
    """Whether an entry leaves out all cells of its tasks and budgets."""
    return entry.leave_out and all(
        getattr(entry, key) is None for key in ("attack", "rate", "victim_seed", "method", "seed")
    )


def _check_budget(place: int, budget: GridBudget, tasks: dict[str, GridTask], problems: Problems) -> None:
    location: Location = ("budgets", place)
    for name, task in tasks.items():
        if budget.source == "train" and task.train is None:
            problems.add(location, f"budgets.{place} is drawn from train, but tasks.{name} has no train.")
        elif budget.source == "train" and task.poisoned_by_others:
            problems.add(
                location, f"budgets.{place} is drawn from train, but the train of tasks.{name} is poisoned already."
            )
        elif budget.source == "unseen" and task.clean is None and task.held_out < budget.n:
            problems.add(
                location,
                f"budgets.{place}.n must be at most tasks.{name}.held_out, which is {task.held_out}, got {budget.n}. "
                f"Raise held_out, or give clean.",
            )


def _check_filters(cells: list[Any], known: dict[str, list[str]], budgets: int, problems: Problems) -> None:
    for place, entry in enumerate(cells):
        for kind, names in known.items():
            for name in (getattr(entry, kind) if entry is not None else None) or ():
                if name not in names:
                    close = difflib.get_close_matches(name, names, n=1)
                    hint = f" Did you mean '{close[0]}'?" if close else f" There are {', '.join(names)}."
                    problems.add(("cells", place, kind), f"The grid has no {kind} '{name}'.{hint}")
        for number in (entry.budget if entry is not None else None) or ():
            if number >= budgets:
                problems.add(("cells", place, "budget"), f"Budgets count from 0 to {budgets - 1}, got {number}.")
