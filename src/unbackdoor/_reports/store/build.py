"""From a store to a report. Averages are taken over the seeds of one setting, and over nothing else."""

import json
from collections import Counter, defaultdict
from typing import Any

from unbackdoor._bench import Store
from unbackdoor._errors import UnbackdoorError
from unbackdoor._reports.store.guards import guard_rows
from unbackdoor._reports.store.numbers import Block, CellLine, Failure, Report, Row, Spread, UnimplantedVictim
from unbackdoor._reports.store.records import Record, read
from unbackdoor._reports.store.settings import BASELINES, Names, Setting
from unbackdoor._reports.store.stress import stress_rows


def build(store: Store, shown: str, *, whole: bool = False) -> tuple[Report, list[Record]]:
    """The numbers of a store.

    Args:
        store: the store with the cells.
        shown: the address in commands.
        whole: also return the whole records, for the page.

    Returns:
        the report, and the records in the order of its cells.

    Raises:
        UnbackdoorError: there is no cell.
    """
    every, odd = _read_records(store, whole)
    names = Names.of(every)
    records = [record for record in every if not record.guards]
    settings: dict[Setting, list[Record]] = defaultdict(list)
    for record in records:
        settings[Setting.of(record)].append(record)
    before = {record.victim: record for record in records if names.kind(record) == "none" and not record.message}
    controls = {_partner(record): record for record in records if record.control and record.message is None}
    rows: list[Row] = []
    cells: list[CellLine] = []
    ordered: list[Record] = []
    for setting in sorted(settings, key=names.order):
        mine = sorted(settings[setting], key=lambda each: (each.victim_seed or 0, each.seed, each.key))
        rows.append(
            _row(names.labels(setting), names.baseline(setting), setting.clean == "null", mine, before, controls)
        )
        cells += [_cell_line(record, len(rows) - 1) for record in mine]
        ordered += mine
    failures = tuple(
        Failure(line.key, line.row, line.victim_seed, line.seed, record.message)
        for line, record in zip(cells, ordered, strict=True)
        if record.message is not None
    )
    report = Report(
        store=shown,
        rows=tuple(rows),
        blocks=tuple(_blocks(rows)),
        cells=tuple(cells),
        left_out=_left_out(ordered, names, before),
        failures=failures,
        stress=stress_rows(store, ordered, [rows[line.row] for line in cells]),
        guards=guard_rows([record for record in every if record.guards], names),
        victim_seconds=_victim_seconds(every, names.tasks),
        **_provenance(every),
        notes=tuple(_notes(rows, odd)),
    )
    return report, ordered


def _read_records(store: Store, whole: bool) -> tuple[list[Record], list[str]]:
    """Returns the records of a store, and the keys of cells that have another form.

    Raises:
        UnbackdoorError: there is no record.
    """
    cells = list(read(store, whole=whole))
    records = [each for each in cells if isinstance(each, Record)]
    odd = [each for each in cells if not isinstance(each, Record)]
    if not records:
        raise UnbackdoorError(
            f"{store.address} has no cell that report can read, got {len(odd):,} of another form. Give the folder or "
            "address that unbackdoor bench wrote to its `out`."
        )
    return records, odd


def _cell_line(record: Record, row: int) -> CellLine:
    status = "failed" if record.message is not None else "left out" if record.implanted is False else "done"
    grid = json.loads(record.provenance).get("grid")
    return CellLine(record.key, row, record.victim_seed, record.seed, status, str(grid or "GRID.toml"))


def _left_out(records: list[Record], names: Names, before: dict[str, Record]) -> tuple[UnimplantedVictim, ...]:
    """Returns the victims in which the attack did not implant, with the number of their cells left out of averages."""
    counts: Counter[tuple[str, str, float | None, int | None, str]] = Counter(
        (
            names.tasks[record.task],
            names.attacks[record.task, record.attack],
            record.rate,
            record.victim_seed,
            record.victim,
        )
        for record in records
        if record.message is None and record.implanted is False
    )
    return tuple(
        UnimplantedVictim(task, attack, rate, seed, _success(before.get(victim)), count)
        for (task, attack, rate, seed, victim), count in counts.items()
    )


def _partner(record: Record, seed: bool = True) -> tuple[Any, ...]:
    """Returns the settings that a cell shares with that of its clean control."""
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
    of_controls = [_control_of(record, controls) for record in counted if not record.control]
    flips = [
        (control.flips or {}).get(record.victim)
        for record, control in zip([each for each in counted if not each.control], of_controls, strict=True)
        if control is not None
    ]
    distrusted = [record.distrusted for record in counted if record.distrusted is not None]
    lost, added = [], []
    for record in counted:
        victim = before.get(record.victim)
        if victim is not None and victim.accuracy is not None and record.accuracy is not None:
            lost.append(victim.accuracy.value - record.accuracy.value)
        if victim is not None and victim.loss is not None and record.loss is not None:
            added.append(record.loss.value - victim.loss.value)
    return Row(
        task=task,
        attack=attack,
        rate=rate,
        budget=budget,
        method=method,
        baseline=baseline,
        control=records[0].control,
        budgetless=budgetless,
        zero_shot=any(record.zero_shot for record in finished),
        label_rule=next((record.label_rule for record in finished if record.label_rule), None),
        clean_accuracy=Spread.of_shares(record.accuracy for record in counted),
        attack_success=Spread.of_shares(record.success for record in counted),
        recovered_accuracy=Spread.of_shares(record.recovered for record in counted),
        accuracy_lost=Spread.of(lost),
        flip_rate=Spread.of_shares(flips),
        control_accuracy=Spread.of_shares(control.accuracy for control in of_controls if control is not None),
        second_accuracy=Spread.of_shares(record.second_accuracy for record in counted),
        second_success=Spread.of_shares(record.second_success for record in counted),
        seconds=Spread.of(record.seconds for record in counted if record.seconds is not None),
        memory=Spread.of(record.memory for record in counted if record.memory is not None),
        clean_loss=Spread.of_shares(record.loss for record in counted),
        loss_added=Spread.of(added),
        false_activation=Spread.of_shares(record.false_activation for record in counted),
        empty=Spread.of_shares(record.empty for record in counted),
        control_loss=Spread.of_shares(control.loss for control in of_controls if control is not None),
        second_loss=Spread.of_shares(record.second_loss for record in counted),
        distrusted=Spread.of_shares(each.share for each in distrusted),
        distrust_precision=Spread.of_shares(each.precision for each in distrusted),
        distrust_recall=Spread.of_shares(each.recall for each in distrusted),
        clean_n=next((clean.n for record in finished if (clean := record.accuracy or record.loss)), None),
        triggered_n=next((record.success.n for record in finished if record.success), None),
        counted=len(counted),
        not_implanted=len(finished) - len(counted),
        unknown=sum(record.implanted is None and not record.control for record in counted),
        failed=len(records) - len(finished),
        unusable=sum(record.usable is False for record in counted),
        seeds=tuple(sorted({record.seed for record in counted})),
        victim_seeds=tuple(sorted({record.victim_seed for record in counted if record.victim_seed is not None})),
    )


def _blocks(rows: list[Row]) -> list[Block]:
    """Returns a block for each task and budget, all-to-all apart. A method without clean examples is in each."""
    blocks = []
    for task in dict.fromkeys(row.task for row in rows):
        mine = [(place, row) for place, row in enumerate(rows) if row.task == task]
        budgets = list(dict.fromkeys(row.budget for _, row in mine if not row.budgetless)) or ["none"]
        for budget in budgets:
            here = [(place, row) for place, row in mine if row.budgetless or row.budget == budget]
            for apart in (False, True):
                shown = [(place, row) for place, row in here if row.control or row.apart is apart]
                if all(row.control for _, row in shown) and (apart or any(not row.control for _, row in here)):
                    continue
                tried = {row.column for _, row in shown if not row.budgetless}
                shown = [(place, row) for place, row in shown if row.control or row.column in tried or not tried]
                columns = tuple(dict.fromkeys(row.column for _, row in shown))
                kept = sorted(
                    {(_rank(row), row.method) for _, row in shown}
                    | {
                        (place, name)
                        for place, name in enumerate(BASELINES)  # an absent one shows as empty cells
                        if not any(row.baseline == name for _, row in shown)
                    }
                )
                methods = tuple(name for _, name in kept)
                places = {(row.method, row.column): place for place, row in shown}
                cells = tuple(tuple(places.get((name, column)) for column in columns) for name in methods)
                over = tuple(_over([rows[place] for place in line if place is not None]) for line in cells)
                blocks.append(Block(task, budget, apart, columns, methods, cells, over))
    return blocks


def _over(rows: list[Row]) -> Spread | None:
    """Returns the attack success of a method over attacks; each counts once, however many seeds it has."""
    return Spread.of(row.attack_success.mean for row in rows if row.attack_success is not None and not row.control)


def _rank(row: Row) -> int:
    return BASELINES.index(row.baseline) if row.baseline else len(BASELINES)


def _victim_seconds(records: list[Record], tasks: dict[str, str]) -> dict[str, Spread]:
    seconds: dict[str, dict[str, float]] = defaultdict(dict)
    for record in records:
        if record.training is not None:
            seconds[tasks[record.task]][record.victim] = record.training
    spreads = {task: Spread.of(of_victims.values()) for task, of_victims in sorted(seconds.items())}
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
    lacking: dict[str, list[str]] = {}
    tasks = list(dict.fromkeys(row.task for row in rows))
    for task in tasks:
        mine = [row for row in rows if row.task == task]
        if not any(row.control for row in mine):
            lacking.setdefault("clean control: what a method does to a clean model is not known", []).append(task)
        bare = sorted(
            {row.budget for row in mine if not row.budgetless}
            - {row.budget for row in mine if row.baseline == "fine-tuning"}
        )
        if bare:
            lacking.setdefault(f"plain fine-tuning with the clean budget {', '.join(bare)}", []).append(task)
    for what, those in lacking.items():
        named = f"All {len(tasks):,} tasks" if len(those) == len(tasks) > 1 else ", ".join(those)
        notes.append(f"{named} {'has' if len(those) == 1 else 'have'} no {what}.")
    unknown = sum(row.unknown for row in rows)
    if unknown:
        notes.append(
            f"Of {unknown:,} {'cell' if unknown == 1 else 'cells'} it is not known whether the attack was implanted "
            "before; they are in the averages and marked with a question mark."
        )
    return notes
