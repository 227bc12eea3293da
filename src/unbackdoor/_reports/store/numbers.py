"""What a report holds: settings with their means and spreads, tables of them, cells, failures."""

import dataclasses
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from unbackdoor._reports.store.records import Share
from unbackdoor._reports.store.stress import StressRow

FORMAT = 1  # of the JSON


@dataclass(frozen=True)
class Spread:
    """Several measurements of one setting.

    Args:
        mean: over seeds.
        sd: sample standard deviation (n - 1 below the line); None of a single one.
        n: how many.
        least, most: of them.
        interval: 95 % Wilson interval of a single share.

    >>> Spread.of([0.25, 0.75]).mean
    0.5
    """

    mean: float
    sd: float | None
    n: int
    least: float
    most: float
    interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """The spread of numbers; None of none."""
        found = list(values)
        if not found:
            return None
        sd = statistics.stdev(found) if len(found) > 1 else None
        return cls(math.fsum(found) / len(found), sd, len(found), min(found), max(found))

    @classmethod
    def of_shares(cls, shares: Iterable[Share | None]) -> "Spread | None":
        """The spread of shares; those that were not measured are passed over."""
        found = [share for share in shares if share is not None]
        made = cls.of(share.value for share in found)
        if made is None or len(found) > 1 or found[0].low is None or found[0].high is None:
            return made
        return dataclasses.replace(made, interval=(found[0].low, found[0].high))


@dataclass(frozen=True)
class Row:
    """One setting: everything that determines a result, but for the seeds.

    Args:
        task, attack, budget, method: short names.
        baseline: `none` (the victim before any method), `fine-tuning`, or empty.
        control: whether the victim is the clean control.
        rate: poisoned share; None where it is not known.
        budgetless: the method took no clean example.
        label_rule: None of a control.
        clean_accuracy, attack_success, recovered_accuracy: over the counted cells.
        accuracy_lost: the victim's accuracy before the method less that after it.
        flip_rate: flip rate of the clean control put through the same method, on the same triggers.
        control_accuracy: its clean accuracy.
        second_accuracy, second_success: of the counted cells that were scored on the task's second test examples.
        seconds: seconds of the purification.
        memory: peak, in bytes.
        clean_n, triggered_n: test examples.
        counted: finished cells that the averages are of.
        not_implanted: finished cells that are left out, since the attack did not take.
        unknown: of the counted ones, those of which it is not known whether the attack took.
        failed: cells without a result.
        unusable: of the counted ones, those whose method cost the model its use.
        seeds, victim_seeds: of the counted ones.
    """

    task: str
    attack: str
    rate: float | None
    budget: str
    method: str
    baseline: str
    control: bool
    budgetless: bool
    label_rule: str | None
    clean_accuracy: Spread | None
    attack_success: Spread | None
    recovered_accuracy: Spread | None
    accuracy_lost: Spread | None
    flip_rate: Spread | None
    control_accuracy: Spread | None
    second_accuracy: Spread | None
    second_success: Spread | None
    seconds: Spread | None
    memory: Spread | None
    clean_n: int | None
    triggered_n: int | None
    counted: int
    not_implanted: int
    unknown: int
    failed: int
    unusable: int
    seeds: tuple[int, ...]
    victim_seeds: tuple[int, ...]

    @property
    def apart(self) -> bool:
        """Whether its attack success compares with no other rule's."""
        return self.label_rule == "all-to-all"

    @property
    def column(self) -> str:
        """Attack and poison rate."""
        if self.control:
            return "clean control" + self.attack.removeprefix("none")
        return f"{self.attack} {percent(self.rate)}".rstrip()


@dataclass(frozen=True)
class Block:
    """Methods by attacks, of one task and one clean budget.

    Args:
        apart: it has the all-to-all attacks, else all others.
        columns: attacks and rates on which some method was run with this budget.
        methods: the rows' names.
        cells: row numbers of the report, one list a method, one entry a column; None where nothing was run.
        over: of the attack success, over the attacks that a method was run on; None where there is none.
    """

    task: str
    budget: str
    apart: bool
    columns: tuple[str, ...]
    methods: tuple[str, ...]
    cells: tuple[tuple[int | None, ...], ...]
    over: tuple[Spread | None, ...]


@dataclass(frozen=True)
class CellLine:
    """One cell: where its record is, and how to repeat it."""

    key: str
    row: int
    victim_seed: int | None
    seed: int
    status: str
    grid: str


@dataclass(frozen=True)
class Victim:
    """A victim in which the attack did not take: what it did before any method, where that was measured."""

    task: str
    attack: str
    rate: float | None
    seed: int | None
    success: float | None
    cells: int


@dataclass(frozen=True)
class Failure:
    """A cell without a result."""

    key: str
    row: int
    victim_seed: int | None
    seed: int
    message: str


@dataclass(frozen=True)
class Report:
    """What a store says.

    Args:
        store: its address as a command can name it, without the folders above an absolute one.
        rows: settings, in order.
        blocks: the same as tables.
        cells: all cells, in the order of `rows`.
        left_out: victims whose cells are in no average.
        failures: cells without a result.
        stress: empty where nothing was stressed.
        victim_seconds: by task, of training a victim.
        machines, commits, versions: what the cells were measured with, the most frequent first, with how many cells.
        dates: dates of the first and the last cell; empty where there is none.
        notes: what a reader must know.
    """

    store: str
    rows: tuple[Row, ...]
    blocks: tuple[Block, ...]
    cells: tuple[CellLine, ...]
    left_out: tuple[Victim, ...]
    failures: tuple[Failure, ...]
    stress: tuple[StressRow, ...]
    victim_seconds: dict[str, Spread]
    machines: dict[str, int]
    commits: dict[str, int]
    versions: dict[str, int]
    dates: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def percent(share: float | None) -> str:
    """A rate as a reader writes it; empty where it is not known.

    >>> percent(0.005)
    '0.5 %'
    """
    return "" if share is None else f"{100 * share:.10g} %"
