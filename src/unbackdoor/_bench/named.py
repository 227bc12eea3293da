"""The attacks, methods, detectors, trainers and guards that a grid names, as values."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ArgsKwargs

from unbackdoor import attacks, detectors, guards, purifiers, trainers
from unbackdoor._bench.lines import Location
from unbackdoor._bench.paths import Noted, local
from unbackdoor._errors import UnbackdoorError
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._poisoning.planted_answer import TEST_BEHAVIOUR
from unbackdoor._registry.entries import Entry, find
from unbackdoor._value import error_sentence


@dataclass(frozen=True)
class PlannedAttack:
    """An attack of the grid.

    Args:
        label: its name in tables.
        value: the attack; None for the clean control.
        rates: its poison rates.
        behaviour: what it makes language models answer; None for the harmless sentence, and for classifiers.
    """

    label: str
    value: Any
    rates: tuple[float, ...]
    behaviour: Behaviour | None = None


def planned_attacks(tables: list[dict[str, Any]], folder: Path, problems: Noted) -> dict[str, PlannedAttack]:
    """Returns the attacks of a grid by label, and notes their problems."""
    from unbackdoor._poisoning.abilities import is_repeatable

    planned: dict[str, PlannedAttack] = {}
    for place, table in enumerate(tables):
        location: Location = ("attacks", place)
        label, name, fields = _named(table, location, problems)
        rates = _rates(fields.pop("rate", 0.05), (*location, "rate"), problems)
        behaviour = _behaviour(fields.pop("behaviour", None), (*location, "behaviour"), problems)
        if name == "none":
            problems.add(
                (*location, "name"),
                'The clean control is part of every grid. Leave this out, or see without = ["clean"].',
            )
            continue
        entry = _class_of(name, attacks.REGISTRY, "attack", "attacks", (*location, "name"), problems)
        if entry is None:
            continue
        if not is_repeatable(entry):
            problems.add(
                (*location, "name"),
                f"{name} carries no trigger that could be put on the test examples, so a grid cannot score it. Plant "
                "it by unbackdoor attack, and score it with `triggered_data`.",
            )
            continue
        attack = _value(entry, fields, location, folder, problems)
        _check_new(label, planned, location, problems)
        if attack is not None and rates:
            planned[label] = PlannedAttack(label, attack, rates, behaviour)
    return planned


def _behaviour(entry: Any, location: Location, problems: Noted) -> Behaviour | None:
    """The behaviour of an attack; None for the usual one, which is not part of a cell's identity."""
    if entry is None:
        return None
    try:
        behaviour = Behaviour.of(entry)
    except UnbackdoorError as problem:
        problems.add(location, problem)
        return None
    return None if behaviour == TEST_BEHAVIOUR else behaviour


def _rates(entry: Any, location: Location, problems: Noted) -> tuple[float, ...]:
    rates: list[Any] = entry if isinstance(entry, list) else [entry]
    for rate in rates:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
            problems.add(location, f"The poison rate must be more than 0 and at most 1, got {rate}.")
    if not rates:
        problems.add(location, "The poison rate must be a number or a list of them, got none.")
    return tuple(rates)


def named_methods(tables: list[dict[str, Any]], folder: Path, problems: Noted) -> dict[str, Any]:
    """Returns the methods of a grid by label, and notes their problems."""
    methods: dict[str, Any] = {}
    for place, table in enumerate(tables):
        location: Location = ("methods", place)
        label, name, fields = _named(table, location, problems)
        if not name:
            continue
        steps = name.split("+")
        classes = [
            _class_of(step, purifiers.REGISTRY, "purifier", "methods", (*location, "name"), problems) for step in steps
        ]
        if None in classes:
            continue
        parts = [fields] if len(steps) == 1 else _shared_out(fields, steps, classes, location, problems)
        values = [_value(cls, part, location, folder, problems) for cls, part in zip(classes, parts, strict=True)]
        _check_new(label, methods, location, problems)
        if None not in values:
            methods[label] = values[0] if len(values) == 1 else purifiers.Then(*values)
    return methods


def named_detectors(tables: list[dict[str, Any]], folder: Path, problems: Noted) -> dict[str, Any]:
    """The detectors of a grid by name; notes what is wrong with them."""
    by_name: dict[str, Any] = {}
    for place, table in enumerate(tables):
        location: Location = ("detectors", place)
        _, name, fields = _named(table, location, problems)
        cls = _class_of(name, detectors.REGISTRY, "detector", "detectors", (*location, "name"), problems)
        if cls is None:
            continue
        if name in by_name:
            problems.add(location, f"detectors has '{name}' twice. One audit runs each detector once. Leave one out.")
        detector = _value(cls, fields, location, folder, problems)
        if detector is not None:
            by_name[name] = detector
    return by_name


def named_trainers(tables: list[dict[str, Any]], folder: Path, problems: Noted) -> dict[str, Any]:
    """The trainers of a grid by label; notes what is wrong with them."""
    return _named_values("trainers", tables, trainers.REGISTRY, folder, problems)


def named_guards(tables: list[dict[str, Any]], folder: Path, problems: Noted) -> dict[str, Any]:
    """The guards of a grid by label; notes what is wrong with them."""
    return _named_values("guards", tables, guards.REGISTRY, folder, problems)


def _named_values(
    listing: str, tables: list[dict[str, Any]], entries: tuple[Entry, ...], folder: Path, problems: Noted
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for place, table in enumerate(tables):
        location: Location = (listing, place)
        label, name, fields = _named(table, location, problems)
        cls = _class_of(name, entries, listing.removesuffix("s"), listing, (*location, "name"), problems)
        if cls is None:
            continue
        _check_new(label, values, location, problems)
        value = _value(cls, fields, location, folder, problems)
        if value is not None:
            values[label] = value
    return values


def _shared_out(
    fields: dict[str, Any], steps: list[str], classes: list[Any], location: Location, problems: Noted
) -> list[dict[str, Any]]:
    """Assigns parameters to the steps of a composition: `fst.alpha`, or `alpha` if only one step has it."""
    parts: list[dict[str, Any]] = [{} for _ in steps]
    for key, parameter in fields.items():
        if key in steps and isinstance(parameter, dict):
            for step, part in zip(steps, parts, strict=True):
                part.update(parameter if step == key else {})
            continue
        owners = [place for place, cls in enumerate(classes) if key in getattr(cls, "__dataclass_fields__", {})]
        if len(owners) == 1:
            parts[owners[0]][key] = parameter
        elif owners:
            names = " or ".join(f"{steps[place]}.{key}" for place in owners)
            problems.add((*location, key), f"{key} belongs to several steps of {'+'.join(steps)}; write {names}.")
        else:
            problems.add((*location, key), f"No step of {'+'.join(steps)} has the parameter {key}.")
    return parts


def _named(table: dict[str, Any], location: Location, problems: Noted) -> tuple[str, str, dict[str, Any]]:
    """Returns the label, the name and the other entries of a table."""
    fields = dict(table)
    name, label = fields.pop("name", None), fields.pop("label", None)
    if not isinstance(name, str):
        problems.add(location, f"{location[0]}.{location[1]}.name must be given, as text.")
        name = ""
    return str(name if label is None else label), name, fields


def _class_of(
    name: str, entries: tuple[Entry, ...], kind: str, listing: str, location: Location, problems: Noted
) -> Any:
    """Returns the class of a name; None if there is a problem."""
    if not name:
        return None
    try:
        cls = find(name, entries, kind, listing).resolve()
    except UnbackdoorError as problem:
        problems.add(location, problem)
        return None
    if not isinstance(cls, type):
        problems.add(location, f"{name} must be a class, got {type(cls).__name__}.")
        return None
    return cls


def _value(cls: Any, fields: dict[str, Any], location: Location, folder: Path, problems: Noted) -> Any:
    """Returns a method or an attack; None if there are problems, which are noted."""
    fields = {name: local(parameter, folder) for name, parameter in fields.items()}
    try:
        validator = getattr(cls, "__pydantic_validator__", None)
        if validator is not None:
            validator.validate_python(ArgsKwargs((), fields))  # unlike the class, it lists all problems
        return cls(**fields)
    except ValidationError as problem:
        for error in problem.errors():
            problems.add((*location, *error["loc"]), error_sentence(error, cls.__name__, cls))
    except (UnbackdoorError, TypeError, ValueError) as problem:
        problems.add(location, f"{cls.__name__}: {problem}" if not isinstance(problem, UnbackdoorError) else problem)
    return None


def _check_new(label: str, known: dict[str, Any], location: Location, problems: Noted) -> None:
    if label in known:
        problems.add(location, f"{location[0]} has '{label}' twice. Give one of them a label of its own.")
