"""Subjects and cells: the models and measurements of a grid, and their identities."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbackdoor import attacks
from unbackdoor._artifacts.attack_record import read_attack_record
from unbackdoor._bench.columns import Column, value_spec
from unbackdoor._bench.grid import Grid
from unbackdoor._bench.paths import content_hash, file_hashes, task_spec
from unbackdoor._bench.schema import Cells, GridBudget, GridTask
from unbackdoor._bench.store import identity
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._registry.entries import Need

# The attack of somebody else, known only by examples.
OWN: dict[str, Any] = {"name": "own", "version": 1, "parameters": {}}


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to purify: a victim that is trained, a clean control, or an existing model.

    Args:
        name: name of the task.
        label: label of the attack; `own` for an existing model and for data that others poisoned, `none` for a clean
            control.
        attack: None for a clean control, for an existing model, and for data that others poisoned.
        model: directory of an existing model.
        trigger: `attack.json` of an existing model.
        behaviour: what the attack makes a language model answer; None for the usual sentence, and for classifiers.
        spec: everything that determines the subject and so its key.
    """

    name: str
    task: GridTask
    label: str
    attack: Any
    rate: float | None
    seed: int | None
    model: str | None
    trigger: str | None
    behaviour: Behaviour | None
    spec: dict[str, Any]
    key: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Subject) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def control(self) -> bool:
        """Whether the subject has no backdoor."""
        return self.label == "none"

    @property
    def marked(self) -> bool:
        """Whether its own score has triggered examples; a control of a victim gets the victim's."""
        return not self.control or (
            self.task.control is True and (self.task.triggered is not None or self.trigger is not None)
        )

    def __str__(self) -> str:
        rate = "" if self.rate in (0.0, None) else f" {100 * self.rate:g} %"
        return f"{self.name}, {self.label}{rate}" + ("" if self.seed is None else f", victim seed {self.seed}")


@dataclass(frozen=True, eq=False)
class PlannedCell:
    """A measurement of a subject, with a clean budget and a seed.

    Args:
        column: what is done with the subject before it is scored, or beside that.
        others: for a clean control, the victims whose triggers it is scored with.
        second: whether the cell is also scored on the task's second test examples.
        surrogate: the clean control that the poisoned examples of the subject are made with, if a trainer needs them.
    """

    subject: Subject
    column: Column
    budget: GridBudget | None
    seed: int
    spec: dict[str, Any]
    key: str
    others: tuple[Subject, ...] = ()
    second: bool = False
    surrogate: Subject | None = None

    @property
    def label(self) -> str:
        """The name of its column."""
        return self.column.label

    @property
    def method(self) -> Any:
        """The method that purifies the subject; None if none does."""
        return self.column.value if self.column.kind == "method" else None

    @property
    def needs(self) -> tuple[Subject, ...]:
        """The models without which it cannot be measured."""
        return (self.subject,) if self.surrogate is None else (self.subject, self.surrogate)

    @property
    def detectors(self) -> tuple[Any, ...]:
        """Those of an audit."""
        return self.column.value if self.column.kind == "audit" else ()

    def __str__(self) -> str:
        budget = "" if self.budget is None else f", {self.budget.n:,} {self.budget.source}"
        seed = "" if self.column.kind == "none" else f", seed {self.seed}"
        return f"{self.subject}: {self.label}{budget}{seed}"


class Subjects:
    """The subjects of a grid, each made once, in the order of their first use."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.files = {name: file_hashes(task) for name, task in grid.tasks.items()}
        self.tasks = {name: task_spec(name, task, self.files[name]) for name, task in grid.tasks.items()}
        self.subjects: dict[tuple[Any, ...], Subject] = {}
        self.order: dict[Subject, int] = {}

    def of(self, entry: Cells) -> Iterator[Subject]:
        """Returns the subjects of an entry, clean controls included."""
        grid = self.grid
        for name, task in grid.tasks.items():
            if entry.task and name not in entry.task:
                continue
            if task.model is not None:
                yield from self._existing(name, task)
                continue
            if task.poisoned_by_others:
                for seed in entry.victim_seed or grid.victim_seeds:
                    yield self._subject(name, task, "own", None, None, seed)
                yield from self._beside(name, task)
                continue
            for seed, planned in itertools.product(entry.victim_seed or grid.victim_seeds, grid.attacks):
                rates = planned.rates if planned.value is None or not entry.rate else entry.rate
                for rate in rates:
                    yield self._subject(
                        name, task, planned.label, planned.value, rate, seed, behaviour=planned.behaviour
                    )

    def controlled_by(self, subject: Subject, victims: set[Subject]) -> tuple[Subject, ...]:
        """The victims that a clean control is the control of."""
        if not subject.control:
            return ()
        mine = [other for other in victims if other.name == subject.name and other.seed in (subject.seed, None)]
        if subject.model is not None:
            mine = [other for other in victims if other.name == subject.name]
        return tuple(sorted(mine, key=self.order.__getitem__))

    def _existing(self, name: str, task: GridTask) -> Iterator[Subject]:
        from unbackdoor._poisoning.attack_file import load_trigger

        assert task.model is not None
        if task.control is True:
            yield self._subject(name, task, "none", None, 0.0, None, model=task.model, trigger=task.attack)
            return
        if task.triggered is not None:
            yield self._subject(name, task, "own", None, None, None, model=task.model)
            yield from self._beside(name, task)
            return
        path = Path(task.attack or Path(task.model) / "attack.json")
        attack = load_trigger(path).attack
        recorded = read_attack_record(path)
        yield self._subject(
            name, task, "own", attack, recorded.rate, recorded.seed, model=task.model, trigger=str(path)
        )
        yield from self._beside(name, task)

    def _beside(self, name: str, task: GridTask) -> Iterator[Subject]:
        """Returns the clean model that a task names for an existing one, unless the grid leaves clean controls out."""
        if isinstance(task.control, str) and any(planned.value is None for planned in self.grid.attacks):
            yield self._subject(name, task, "none", None, 0.0, None, model=task.control)

    def _subject(
        self,
        name: str,
        task: GridTask,
        label: str,
        attack: Any,
        rate: float | None,
        seed: int | None,
        *,
        model: str | None = None,
        trigger: str | None = None,
        behaviour: Behaviour | None = None,
    ) -> Subject:
        known = (name, label, rate, seed)
        if known not in self.subjects:
            described = OWN if attack is None and label == "own" else value_spec(attack, attacks.REGISTRY)
            if behaviour is not None:
                described = {**described, "behaviour": str(behaviour)}
            spec: dict[str, Any] = {"task": self.tasks[name], "attack": described}
            spec |= {"rate": rate, "seed": seed}
            if model is not None:
                spec["model"] = content_hash((model,))
            if model is not None and task.factory is not None:
                file, _, function = task.factory.rpartition(":")
                spec["factory"] = f"{content_hash((file,))}:{function}"
            if trigger is not None:
                spec["trigger"] = content_hash((str(Path(trigger).with_name("trigger.safetensors")),))
            elif model == task.model and task.triggered is not None:
                spec["trigger"] = content_hash(task.triggered)
            key = identity(spec)
            subject = Subject(name, task, label, attack, rate, seed, model, trigger, behaviour, spec, key)
            self.subjects[known] = subject
            self.order[subject] = len(self.order)
        return self.subjects[known]


def cell_of(
    subject: Subject, column: Column, budget: GridBudget | None, seed: int, files: dict[str, str]
) -> PlannedCell:
    """The cell of a combination."""
    clean = None
    if budget is not None:
        data = files["train"] if budget.source == "train" else files.get("clean", files["test"])
        clean = {"from": budget.source, "n": budget.n, "seed": budget.seed, "data": data}
    spec: dict[str, Any] = {"victim": subject.spec, "method": column.spec, "clean": clean, "seed": seed}
    for name in taken(subject.task, column):
        spec[name] = files[name]
    return PlannedCell(subject, column, budget, seed, spec, identity(spec))


def taken(task: GridTask, column: Column) -> list[str]:
    """The further entries of a task that the cells of a column use, and that are part of their identity."""
    from unbackdoor._purification.method import uses_unlabelled

    # Of a method that is not registered it is not known what it takes: assume everything.
    takes = {
        "proxy": column.kind == "method" and column.needs(Need.PROXY, unknown=True),
        "unlabelled": column.kind == "method" and uses_unlabelled(column.value),
        "reference": column.kind == "guard" and column.needs(Need.REFERENCE, unknown=True),
    }
    return [name for name, uses in takes.items() if uses and getattr(task, name) is not None]
