"""Tables next to those of methods by attacks: what trainers distrust, and guards in front of the victims."""

from collections.abc import Callable
from typing import NamedTuple

from unbackdoor._reports.store.numbers import GuardRow, Report, Spread, percent

_AROUND = "in brackets the 95 % interval of a single run, or the standard deviation (sd) of several"


class FurtherTable(NamedTuple):
    """A table as text, not yet escaped."""

    title: str
    meaning: str
    head: list[str]
    rows: list[list[str]]


def further_tables(report: Report) -> list[FurtherTable]:
    """Returns the tables that the report has rows for."""
    tables = (_distrusted_rows(report), _guards(report))
    return [table for table in tables if table.rows]


def _distrusted_rows(report: Report) -> FurtherTable:
    head = ["task", "attack", "trainer", "distrusted", "precision", "recall", "n"]
    meaning = (
        "The share of the training data that a trainer distrusts, the share of these rows that are poisoned "
        f"(precision), and the share of the poisoned rows that are among them (recall), in %; {_AROUND}."
    )
    rows = [
        [row.task, row.column, row.method]
        + [around(spread) for spread in (row.distrusted, row.distrust_precision, row.distrust_recall)]
        + [str(row.counted)]
        for row in report.rows
        if row.distrusted is not None
    ]
    return FurtherTable("Distrusted rows", meaning, head, rows)


def _guards(report: Report) -> FurtherTable:
    rows = report.guards
    classes, prompts = any(row.accuracy for row in rows), any(row.answers_kept for row in rows)
    parts: list[tuple[str, Callable[[GuardRow], str], bool]] = [
        ("task", lambda row: row.task, True),
        ("budget", lambda row: row.budget, True),
        ("attack", lambda row: row.column, True),
        ("guard", lambda row: row.guard, True),
        ("asked for", lambda row: percent(row.asked) or "–", True),
        ("false alarms", lambda row: around(row.false_alarms), True),
        ("missed attacks", lambda row: around(row.missed), True),
        ("area under the curve", lambda row: around(row.area, unit=1, digits=3), True),
        ("attack success", lambda row: around(row.attack_success), True),
        ("without the guard", lambda row: around(row.attack_success_without), True),
        ("accuracy of what passes", lambda row: around(row.accuracy), classes),
        ("accuracy without the guard", lambda row: around(row.accuracy_without), classes),
        ("answers kept", lambda row: around(row.answers_kept), prompts),
        ("passes an input", _passes, True),
        ("inputs", lambda row: f"{_count(row.clean_n)} clean, {_count(row.triggered_n)} triggered", True),
        ("n", _runs, True),
    ]
    shown = [(name, entry) for name, entry, there in parts if there]
    meaning = (
        "A guard decides about single inputs in front of the victim. In %: clean inputs that raise an alarm, next to "
        "the share that was asked for; missed attacks are triggered inputs that pass, or are changed and answered as "
        f"the attacker wants all the same; {_AROUND}. Passes are forward passes of the model, its own answer included."
    )
    return FurtherTable(
        "Guards", meaning, [name for name, _ in shown], [[entry(row) for _, entry in shown] for row in rows]
    )


def around(spread: Spread | None, unit: float = 100, digits: int = 1) -> str:
    """A mean with the interval of a single run, or with the standard deviation of several.

    >>> around(Spread.of([0.25, 0.75])), around(None)
    ('50.0 (sd 35.4)', '–')
    """
    if spread is None:
        return "–"
    mean = f"{unit * spread.mean:.{digits}f}"
    if spread.sd is not None:
        return f"{mean} (sd {unit * spread.sd:.{digits}f})"
    if spread.interval is None:
        return mean
    return f"{mean} ({' to '.join(f'{unit * end:.{digits}f}' for end in spread.interval)})"


def _passes(row: GuardRow) -> str:
    if row.forwards is None:
        return "–"
    reference = row.reference_forwards
    more = f", {reference.mean:.2f} of the reference" if reference is not None and reference.mean else ""
    return f"{row.forwards.mean:.2f}{more}"


def _count(number: int | None) -> str:
    return "no" if number is None else f"{number:,}"


def _runs(row: GuardRow) -> str:
    """The number of runs, and of those that are in no average."""
    marks = [f"† {row.not_implanted} left out"] if row.not_implanted else []
    marks += [f"{row.failed} failed"] if row.failed else []
    return str(row.counted) + (f" ({', '.join(marks)})" if marks else "")
