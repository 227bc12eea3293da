"""Columns of a grid: what its cells do with a subject, and how that enters their identity."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unbackdoor import guards, purifiers, trainers
from unbackdoor._bench.grid import AUDIT, NOTHING, Grid
from unbackdoor._bench.paths import content_hash
from unbackdoor._registry.entries import Entry, Need, entry_of, name_of, steps_of
from unbackdoor._value import changed_fields, fields_of

NONE: dict[str, Any] = {"name": "none", "version": 1, "parameters": {}}
AUDIT_VERSION = 1  # of the split into halves and of the judging

Kind = Literal["none", "method", "audit", "trainer", "guard"]
REGISTRIES: dict[Kind, tuple[Entry, ...]] = {
    "method": purifiers.REGISTRY,
    "trainer": trainers.REGISTRY,
    "guard": guards.REGISTRY,
}


@dataclass(frozen=True, eq=False)
class Column:
    """What the cells of a column do with their subjects.

    Args:
        label: its name in the grid.
        kind: `none` scores a subject as it is, `method` purifies it, `audit` audits it, `trainer` trains another model
            on its poisoned data, `guard` puts a guard in front of it.
        value: the method, the trainer or the guard; of an audit its detectors; None of `none`.
        spec: what it adds to the identity of a cell.
        false_alarms: of a guard, the shares that it is measured at.
    """

    label: str
    kind: Kind
    value: Any
    spec: dict[str, Any]
    false_alarms: tuple[float, ...] = ()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The facts of its kind of values."""
        return REGISTRIES.get(self.kind, ())

    @property
    def makes_model(self) -> bool:
        """Whether its cells score another model than the subject."""
        return self.kind in ("method", "trainer")

    @property
    def takes_clean(self) -> bool:
        """Whether its cells get clean examples."""
        from unbackdoor._purification.method import needs_clean
        from unbackdoor._robust_training.trainer import needs_clean as trainer_needs_clean

        takes = {"none": False, "audit": True, "guard": True}
        if self.kind in takes:
            return takes[self.kind]
        return needs_clean(self.value) if self.kind == "method" else trainer_needs_clean(self.value)

    def needs(self, need: Need, *, unknown: bool) -> bool:
        """Whether a value of it needs something; `unknown` is the answer for one that is not registered."""
        found = [entry_of(step, self.entries) for step in steps_of(self.value) if step is not None]
        return any(unknown if entry is None else need in entry.needs for entry in found)


def columns_of(grid: Grid) -> dict[str, Column]:
    """The columns of a grid by label, in the order of its cells."""
    columns = {NOTHING: Column(NOTHING, "none", None, NONE)}
    for label, method in grid.methods.items():
        columns[label] = Column(label, "method", method, value_spec(method, purifiers.REGISTRY))
    if grid.detectors:
        columns[AUDIT] = Column(AUDIT, "audit", tuple(grid.detectors.values()), audit_spec(grid.detectors))
    for label, trainer in grid.trainers.items():
        spec = {**value_spec(trainer, trainers.REGISTRY), "kind": "trainer"}
        columns[label] = Column(label, "trainer", trainer, spec)
    for label, guard in grid.guards.items():
        spec = {**value_spec(guard, guards.REGISTRY), "kind": "guard"}
        shares = grid.false_alarms if _is_movable(guard) else ()
        if shares:
            spec["false_alarms"] = list(shares)
        columns[label] = Column(label, "guard", guard, spec, shares)
    return columns


def _is_movable(guard: Any) -> bool:
    from unbackdoor._guarding.guard import is_movable

    return is_movable(guard)


def value_spec(instance: Any, entries: tuple[Entry, ...]) -> dict[str, Any]:
    """Returns what determines results: name, version, and the parameters that differ from their defaults."""
    if instance is None:
        return NONE
    if steps_of(instance) != (instance,):
        parts = [value_spec(step, entries) for step in steps_of(instance)]
        lists = {key: [part[key] for part in parts] for key in ("version", "parameters")}
        return {"name": name_of(instance, entries), **lists}
    parameters = {name: _hashed(parameter) for name, parameter in changed_fields(instance).items()}
    return {"name": name_of(instance, entries), "version": getattr(instance, "version", 1), "parameters": parameters}


def audit_spec(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of an audit that determine its result: each detector's version and all settings, defaults included."""
    described = {
        name: {"version": getattr(detector, "version", 1), **fields_of(detector)} for name, detector in chosen.items()
    }
    return {"name": "audit", "version": AUDIT_VERSION, "parameters": described}


def _hashed(parameter: Any) -> Any:
    if isinstance(parameter, str) and Path(parameter).is_absolute() and Path(parameter).is_file():
        return f"sha256:{content_hash((parameter,))}"
    return parameter
