"""Grid files: TOML into checked values. All problems are told at once, each with its line."""

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from unbackdoor import attacks, purifiers
from unbackdoor._bench._lines import Location, line_of, lines_of
from unbackdoor._bench._paths import check_task, local
from unbackdoor._bench._schema import Budget, Cells, File, Resources, Task
from unbackdoor._errors import UnbackdoorError
from unbackdoor._registry import Entry, find
from unbackdoor._values import error_sentence


@dataclass(frozen=True)
class Planned:
    """An attack of the grid: its label, the value (None for the clean control), its poison rates."""

    label: str
    value: Any
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Grid:
    """A checked grid. Paths are as this machine finds them, names are values."""

    path: Path
    text: str
    tasks: dict[str, Task]
    attacks: tuple[Planned, ...]
    methods: dict[str, Any]
    budgets: tuple[Budget, ...]
    victim_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cells, ...]
    resources: Resources


class Problems:
    """What is wrong with a grid file, found bit by bit."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.lines = path, lines_of(text)
        self.found: list[tuple[int, str]] = []

    def add(self, location: Location, message: object) -> None:
        """Note a problem of an entry."""
        entry = (line_of(location, self.lines) or 1, " ".join(str(message).split()))
        if entry not in self.found:
            self.found.append(entry)

    def refuse(self) -> None:
        """Raise, if there are any."""
        if self.found:
            count = "a problem" if len(self.found) == 1 else f"{len(self.found)} problems"
            told = [f"  line {line}: {message}" for line, message in sorted(self.found)]
            raise UnbackdoorError("\n".join([f"{self.path} has {count}:", *told]))


def read(path: str | Path) -> Grid:
    """Read and check a grid file.

    Raises:
        UnbackdoorError: lists all that is wrong with it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text)
    except FileNotFoundError:
        raise UnbackdoorError(f"{path} does not exist; GRID is a TOML file. See docs/bench.md.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise UnbackdoorError(f"{path} cannot be read as TOML ({problem}). Repair it.") from None
    problems = Problems(path, text)
    try:
        file = File.model_validate(raw)
        written: dict[str, Any] = {name: getattr(file, name) for name in File.model_fields}
    except ValidationError as problem:
        for error in problem.errors():
            problems.add(tuple(error["loc"]), _schema_sentence(error))
        written = _salvaged(raw)
    tasks = {name: check_task(name, task, path.parent, problems) for name, task in written["tasks"].items()}
    planned = _attacks(written["attacks"], path.parent, problems)
    methods = _methods(written["methods"], path.parent, problems)
    clean = "clean" not in written["without"]
    if clean:
        planned = {"none": Planned("none", None, (0.0,)), **planned}
    for name, task in tasks.items():
        if clean and task.model is not None and task.control is None:
            problems.add(
                ("tasks", name, "model"),
                f'tasks.{name}.control must name a clean model for comparison; or say without = ["clean"].',
            )
        if task.model is None and not written["attacks"] and not clean:
            problems.add(("tasks", name), f"tasks.{name} has no victim: there is no attack and no clean control.")
    if "fine-tuning" not in written["without"]:
        fine_tuning = find("fine-tuning", purifiers.REGISTRY, "purifier", "methods").resolve()
        if not any(isinstance(method, fine_tuning) for method in methods.values()):
            methods = {"fine-tuning": fine_tuning(), **methods}
    for place, budget in enumerate(written["budgets"]):
        if budget is not None:
            _check_budget(place, budget, tasks, problems)
    given_tasks = raw.get("tasks")
    known = {
        "task": list(given_tasks) if isinstance(given_tasks, dict) else [],
        "attack": [*_labels(written["attacks"]), "none", "own"],
        "method": [*_labels(written["methods"]), *methods, "none"],
    }
    _check_filters(written["cells"], known, len(written["budgets"]), problems)
    problems.refuse()
    return Grid(
        path=path,
        text=text,
        tasks=tasks,
        attacks=tuple(planned.values()),
        methods=methods,
        budgets=tuple(written["budgets"]),
        victim_seeds=written["victim_seeds"],
        seeds=written["seeds"],
        cells=tuple(written["cells"]),
        resources=written["resources"],
    )


def _schema_sentence(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        *owner, name = error["loc"]
        tables = {"tasks": Task, "budgets": Budget, "cells": Cells, "resources": Resources}
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
    """What can be read of a grid whose tables are not all right, so that the rest of its problems is told, too."""
    tasks = raw.get("tasks")
    made_tasks = {name: _made(Task, given) for name, given in tasks.items()} if isinstance(tasks, dict) else {}
    without = raw.get("without")
    return {
        "tasks": {name: task for name, task in made_tasks.items() if task is not None},
        "attacks": _tables(raw.get("attacks")),
        "methods": _tables(raw.get("methods")),
        "budgets": [_made(Budget, given) for given in _tables(raw.get("budgets"))],
        "cells": [_made(Cells, given) for given in _tables(raw.get("cells"))],
        "without": without if isinstance(without, list) else [],
    }


def _tables(given: Any) -> list[dict[str, Any]]:
    return [entry for entry in given if isinstance(entry, dict)] if isinstance(given, list) else []


def _made(table: type[BaseModel], given: Any) -> Any:
    try:
        return table.model_validate(given)
    except ValidationError:
        return None


def _labels(tables: list[dict[str, Any]]) -> list[str]:
    return [str(table.get("label", table.get("name"))) for table in tables]


def _attacks(tables: list[dict[str, Any]], folder: Path, problems: Problems) -> dict[str, Planned]:
    planned: dict[str, Planned] = {}
    for place, given in enumerate(tables):
        location: Location = ("attacks", place)
        label, name, fields = _named(given, location, problems)
        rates = _rates(fields.pop("rate", 0.05), (*location, "rate"), problems)
        if name == "none":
            problems.add(
                (*location, "name"),
                'The clean control is part of every grid. Leave this out, or see without = ["clean"].',
            )
            continue
        entry = _found(name, attacks.REGISTRY, "attack", "attacks", (*location, "name"), problems)
        if entry is None:
            continue
        if not getattr(entry, "repeatable", True):
            problems.add(
                (*location, "name"),
                f"{name} carries no trigger that could be put on the test examples, so a grid cannot score it. Plant "
                "it by unbackdoor attack, and score with evaluate --triggered.",
            )
            continue
        made = _value(entry, fields, location, folder, problems)
        _check_new(label, planned, location, problems)
        if made is not None and rates:
            planned[label] = Planned(label, made, rates)
    return planned


def _rates(given: Any, location: Location, problems: Problems) -> tuple[float, ...]:
    rates: list[Any] = given if isinstance(given, list) else [given]
    for rate in rates:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
            problems.add(location, f"The poison rate must be more than 0 and at most 1, got {rate}.")
    if not rates:
        problems.add(location, "The poison rate must be a number or a list of them, got none.")
    return tuple(rates)


def _methods(tables: list[dict[str, Any]], folder: Path, problems: Problems) -> dict[str, Any]:
    methods: dict[str, Any] = {}
    for place, given in enumerate(tables):
        location: Location = ("methods", place)
        label, name, fields = _named(given, location, problems)
        if not name:
            continue
        steps = name.split("+")
        found = [
            _found(step, purifiers.REGISTRY, "purifier", "methods", (*location, "name"), problems) for step in steps
        ]
        if None in found:
            continue
        parts = [fields] if len(steps) == 1 else _shared_out(fields, steps, found, location, problems)
        made = [_value(cls, part, location, folder, problems) for cls, part in zip(found, parts, strict=True)]
        _check_new(label, methods, location, problems)
        if None not in made:
            methods[label] = made[0] if len(made) == 1 else purifiers.Then(*made)
    return methods


def _shared_out(
    fields: dict[str, Any], steps: list[str], classes: list[Any], location: Location, problems: Problems
) -> list[dict[str, Any]]:
    """Which step of a composition gets which parameter: `fst.alpha`, or plain where one step alone has it."""
    parts: list[dict[str, Any]] = [{} for _ in steps]
    for key, given in fields.items():
        if key in steps and isinstance(given, dict):
            for step, part in zip(steps, parts, strict=True):
                part.update(given if step == key else {})
            continue
        owners = [place for place, cls in enumerate(classes) if key in getattr(cls, "__dataclass_fields__", {})]
        if len(owners) == 1:
            parts[owners[0]][key] = given
        elif owners:
            names = " or ".join(f"{steps[place]}.{key}" for place in owners)
            problems.add((*location, key), f"{key} belongs to several steps of {'+'.join(steps)}; write {names}.")
        else:
            problems.add((*location, key), f"No step of {'+'.join(steps)} has the parameter {key}.")
    return parts


def _named(given: dict[str, Any], location: Location, problems: Problems) -> tuple[str, str, dict[str, Any]]:
    """Label, name and the rest of a table."""
    fields = dict(given)
    name, label = fields.pop("name", None), fields.pop("label", None)
    if not isinstance(name, str):
        problems.add(location, f"{location[0]}.{location[1]}.name must be given, as text.")
        name = ""
    return str(name if label is None else label), name, fields


def _found(
    name: str, entries: tuple[Entry, ...], kind: str, listing: str, location: Location, problems: Problems
) -> Any:
    """The class of a name; None where there is a problem."""
    if not name:
        return None
    try:
        found = find(name, entries, kind, listing).resolve()
    except UnbackdoorError as problem:
        problems.add(location, problem)
        return None
    if not isinstance(found, type):
        problems.add(location, f"{name} must be a class, got {type(found).__name__}.")
        return None
    return found


def _value(cls: Any, fields: dict[str, Any], location: Location, folder: Path, problems: Problems) -> Any:
    """A method or an attack; None where there is a problem, all of which are noted."""
    from pydantic_core import ArgsKwargs

    fields = {name: local(given, folder) for name, given in fields.items()}
    try:
        validator = getattr(cls, "__pydantic_validator__", None)
        if validator is not None:
            validator.validate_python(ArgsKwargs((), fields))  # unlike the class, it tells all that is wrong
        return cls(**fields)
    except ValidationError as problem:
        for error in problem.errors():
            problems.add((*location, *error["loc"]), error_sentence(error, cls.__name__, cls))
    except (UnbackdoorError, TypeError, ValueError) as problem:
        problems.add(location, f"{cls.__name__}: {problem}" if not isinstance(problem, UnbackdoorError) else problem)
    return None


def _check_new(label: str, known: dict[str, Any], location: Location, problems: Problems) -> None:
    if label in known:
        problems.add(location, f"{location[0]} has '{label}' twice. Give one of them a label of its own.")


def _check_budget(place: int, budget: Budget, tasks: dict[str, Task], problems: Problems) -> None:
    location: Location = ("budgets", place)
    for name, task in tasks.items():
        if budget.source == "train" and task.train is None:
            problems.add(location, f"budgets.{place} is drawn from train, but tasks.{name} has no train.")
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
