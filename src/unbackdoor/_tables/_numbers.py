"""All numbers of a report. Cells are averaged over seeds of one setting; what differs otherwise is never merged."""

import dataclasses
import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from unbackdoor._bench import Store
from unbackdoor._errors import UnbackdoorError
from unbackdoor._tables import _names
from unbackdoor._tables._records import Record, Share, read
from unbackdoor._tables._stress import StressRow, stress_rows

FORMAT = 1  # of the JSON
BASELINES = ("none", "fine-tuning")  # stand in every table


@dataclass(frozen=True)
class Spread:
    """Several measurements of one setting.

    Args:
        mean: over seeds.
        sd: sample standard deviation (n - 1 below the line); None of a single one.
        n: how many.
        least, most: of them.
        interval: of a single share, its 95 % Wilson interval.

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
        baseline: `none` (the victim as it came), `fine-tuning`, or empty.
        control: whether the victim is the clean control.
        rate: poisoned share; None where it is not known.
        budgetless: the method took no clean example.
        label_rule: None of a control.
        clean_accuracy, attack_success, recovered_accuracy: over the counted cells.
        accuracy_lost: of the same victim as it came, less that after the method.
        flip_rate: of the clean control put through the same method, on the same triggers.
        control_accuracy: its clean accuracy.
        second_accuracy, second_success: of the counted cells that were scored on the task's second test examples.
        seconds: of the purification.
        memory: peak, in bytes.
        clean_n, triggered_n: test examples.
        counted: finished cells that the averages are of.
        not_implanted: finished cells that are left out, since the attack did not take.
        unknown: of the counted ones, those of which it is not known whether the attack took.
        failed: cells without a result.
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
        columns: attacks and rates.
        methods: the rows' names.
        cells: row numbers of the report, one list a method, one entry a column; None where nothing was run.
    """

    task: str
    budget: str
    apart: bool
    columns: tuple[str, ...]
    methods: tuple[str, ...]
    cells: tuple[tuple[int | None, ...], ...]


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
        dates: of the first and the last cell; empty where there is none.
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


def build(store: Store, shown: str, *, whole: bool = False) -> tuple[Report, list[Record]]:
    """The numbers of a store.

    Args:
        store: where the cells are.
        shown: the address in commands.
        whole: keep the whole records, for the page.

    Returns:
        the report, and the records in the order of its cells.

    Raises:
        UnbackdoorError: there is no cell.
    """
    records, odd = [], []
    for found in read(store, whole=whole):
        if isinstance(found, Record):
            records.append(found)
        else:
            odd.append(found)
    if not records:
        raise UnbackdoorError(
            f"{store.address} has no cell that report can read, got {len(odd):,} of another form. Give the folder or "
            "address that unbackdoor bench wrote with --out."
        )
    tasks = _names.of_tasks({record.task for record in records})
    attacks = _names.of_values({record.attack for record in records})
    methods = _names.of_values({record.method for record in records})
    budgets = _names.of_budgets({record.clean for record in records})
    plain = {text: json.loads(text)["name"] for text in methods}
    settings: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        settings[record.task, record.attack, record.rate, record.clean, record.method].append(record)

    def order(setting: tuple[Any, ...]) -> tuple[Any, ...]:
        task, attack, rate, clean, method = setting
        name = plain[method]
        return (
            tasks[task],
            json.loads(attack)["name"] != "none",
            attacks[attack],
            math.inf if rate is None else -rate,
            budgets[clean],
            BASELINES.index(name) if name in BASELINES else len(BASELINES),
            methods[method],
        )

    before = {(record.victim): record for record in records if plain[record.method] == "none" and not record.message}
    controls = {_partner(record): record for record in records if record.control and record.message is None}
    rows: list[Row] = []
    cells: list[CellLine] = []
    failures: list[Failure] = []
    ordered: list[Record] = []
    absent: dict[tuple[Any, ...], int] = Counter()
    for setting in sorted(settings, key=order):
        task, attack, rate, clean, method = setting
        mine = sorted(settings[setting], key=lambda each: (each.victim_seed or 0, each.seed, each.key))
        name = plain[method] if plain[method] in BASELINES else ""
        labels = (tasks[task], attacks[attack], rate, budgets[clean], methods[method])
        rows.append(_row(labels, name, clean == "null", mine, before, controls))
        for record in mine:
            status = "failed" if record.message is not None else "left out" if record.implanted is False else "done"
            grid = json.loads(record.provenance).get("grid")
            cells.append(
                CellLine(record.key, len(rows) - 1, record.victim_seed, record.seed, status, str(grid or "GRID.toml"))
            )
            ordered.append(record)
            if record.message is not None:
                line = cells[-1]
                failures.append(Failure(line.key, line.row, line.victim_seed, line.seed, record.message))
            elif record.implanted is False:
                absent[tasks[task], attacks[attack], rate, record.victim_seed, record.victim] += 1
    left_out = tuple(
        Victim(task, attack, rate, seed, _success(before.get(victim)), count)
        for (task, attack, rate, seed, victim), count in absent.items()
    )
    stress = stress_rows(store, ordered, [rows[line.row] for line in cells])
    report = Report(
        store=shown,
        rows=tuple(rows),
        blocks=tuple(_blocks(rows)),
        cells=tuple(cells),
        left_out=left_out,
        failures=tuple(failures),
        stress=stress,
        victim_seconds=_victim_seconds(records, tasks),
        **_provenance(records),
        notes=tuple(_notes(rows, odd)),
    )
    return report, ordered


def _partner(record: Record, seed: bool = True) -> tuple[Any, ...]:
    """What a cell and that of its clean control have in common."""
    return record.task, record.method, record.clean, record.seed, record.victim_seed if seed else None


def _control_of(record: Record, controls: dict[tuple[Any, ...], Record]) -> Record | None:
    return controls.get(_partner(record)) or controls.get(_partner(record, seed=False))


def _success(record: Record | None) -> float | None:
    return None if record is None or record.success is None else record.success.value


def _row(
    labels: tuple[str, str, float | None, str, str],
    baseline: str,
    budgetless: bool,
    records: list[Record],
    before: dict[str, Record],
    controls: dict[tuple[Any, ...], Record],
) -> Row:
    task, attack, rate, budget, method = labels
    finished = [record for record in records if record.message is None]
    counted = [record for record in finished if record.implanted is not False]
    beside = [_control_of(record, controls) for record in counted if not record.control]
    flips = [
        (found.flips or {}).get(record.victim)
        for record, found in zip([each for each in counted if not each.control], beside, strict=True)
        if found is not None
    ]
    lost = []
    for record in counted:
        victim = before.get(record.victim)
        if victim is not None and victim.accuracy is not None and record.accuracy is not None:
            lost.append(victim.accuracy.value - record.accuracy.value)
    return Row(
        task=task,
        attack=attack,
        rate=rate,
        budget=budget,
        method=method,
        baseline=baseline,
        control=records[0].control,
        budgetless=budgetless,
        label_rule=next((record.label_rule for record in finished if record.label_rule), None),
        clean_accuracy=Spread.of_shares(record.accuracy for record in counted),
        attack_success=Spread.of_shares(record.success for record in counted),
        recovered_accuracy=Spread.of_shares(record.recovered for record in counted),
        accuracy_lost=Spread.of(lost),
        flip_rate=Spread.of_shares(flips),
        control_accuracy=Spread.of_shares(found.accuracy for found in beside if found is not None),
        second_accuracy=Spread.of_shares(record.second_accuracy for record in counted),
        second_success=Spread.of_shares(record.second_success for record in counted),
        seconds=Spread.of(record.seconds for record in counted if record.seconds is not None),
        memory=Spread.of(record.memory for record in counted if record.memory is not None),
        clean_n=next((record.accuracy.n for record in finished if record.accuracy), None),
        triggered_n=next((record.success.n for record in finished if record.success), None),
        counted=len(counted),
        not_implanted=len(finished) - len(counted),
        unknown=sum(record.implanted is None and not record.control for record in counted),
        failed=len(records) - len(finished),
        seeds=tuple(sorted({record.seed for record in counted})),
        victim_seeds=tuple(sorted({record.victim_seed for record in counted if record.victim_seed is not None})),
    )


def _blocks(rows: list[Row]) -> list[Block]:
    """One for each task and budget, all-to-all apart. A method that took no clean example stands in each."""
    made = []
    for task in dict.fromkeys(row.task for row in rows):
        mine = [(place, row) for place, row in enumerate(rows) if row.task == task]
        budgets = list(dict.fromkeys(row.budget for _, row in mine if not row.budgetless)) or ["none"]
        for budget in budgets:
            here = [(place, row) for place, row in mine if row.budgetless or row.budget == budget]
            for apart in (False, True):
                shown = [(place, row) for place, row in here if row.control or row.apart is apart]
                if all(row.control for _, row in shown) and (apart or any(not row.control for _, row in here)):
                    continue
                columns = tuple(dict.fromkeys(row.column for _, row in shown))
                kept = sorted(
                    {(_rank(row), row.method) for _, row in shown}
                    | {
                        (place, name)
                        for place, name in enumerate(BASELINES)  # one that is absent is seen to be
                        if not any(row.baseline == name for _, row in shown)
                    }
                )
                methods = tuple(name for _, name in kept)
                found = {(row.method, row.column): place for place, row in shown}
                cells = tuple(tuple(found.get((name, column)) for column in columns) for name in methods)
                made.append(Block(task, budget, apart, columns, methods, cells))
    return made


def _rank(row: Row) -> int:
    return BASELINES.index(row.baseline) if row.baseline else len(BASELINES)


def _victim_seconds(records: list[Record], tasks: dict[str, str]) -> dict[str, Spread]:
    seconds: dict[str, dict[str, float]] = defaultdict(dict)
    for record in records:
        if record.training is not None:
            seconds[tasks[record.task]][record.victim] = record.training
    spreads = {task: Spread.of(found.values()) for task, found in sorted(seconds.items())}
    return {task: spread for task, spread in spreads.items() if spread is not None}


def _provenance(records: list[Record]) -> dict[str, Any]:
    machines: Counter[str] = Counter()
    commits: Counter[str] = Counter()
    versions: Counter[str] = Counter()
    dates = set()
    for text, count in Counter(record.provenance for record in records).items():
        entry = json.loads(text)
        if entry.get("device"):
            machines[str(entry["device"])] += count
        commits[str(entry.get("commit") or "not known")] += count
        if isinstance(entry.get("versions"), dict) and entry["versions"]:
            versions[", ".join(f"{name} {number}" for name, number in sorted(entry["versions"].items()))] += count
        if entry.get("date"):
            dates.add(str(entry["date"]))
    return {
        "machines": dict(machines.most_common()),
        "commits": dict(commits.most_common()),
        "versions": dict(versions.most_common()),
        "dates": (min(dates), max(dates)) if dates else (),
    }


def _notes(rows: list[Row], odd: list[str]) -> list[str]:
    notes = []
    if odd:
        notes.append(
            f"{len(odd):,} {'cell has' if len(odd) == 1 else 'cells have'} another form than today's and "
            f"{'is' if len(odd) == 1 else 'are'} in no table; the first is {odd[0]}."
        )
    for task in dict.fromkeys(row.task for row in rows):
        mine = [row for row in rows if row.task == task]
        if not any(row.control for row in mine):
            notes.append(f"{task} has no clean control: what a method does to a clean model is not known.")
        bare = sorted(
            {row.budget for row in mine if not row.budgetless}
            - {row.budget for row in mine if row.baseline == "fine-tuning"}
        )
        if bare:
            notes.append(f"{task} has no plain fine-tuning with the clean budget {', '.join(bare)}.")
    unknown = sum(row.unknown for row in rows)
    if unknown:
        notes.append(
            f"Of {unknown:,} {'cell' if unknown == 1 else 'cells'} it is not known whether the attack was implanted "
            "before; they are in the averages and marked with a question mark."
        )
    return notes
