"""Stress tests in a store: within cells, or as `stress/NAME.json` or `stress/NAME/stress.json`."""

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unbackdoor._bench import Store
from unbackdoor._errors import UnbackdoorError
from unbackdoor._reports.store.records import Record, number

if TYPE_CHECKING:
    from unbackdoor._reports.store.numbers import Row

FORMAT = 1  # of stress.json
MODELS = ("victim", "purified", "exact_oracle", "control")


@dataclass(frozen=True)
class Retuned:
    """Attack success after tuning with `k` triggered examples: mean, sample standard deviation and count of draws."""

    k: int
    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class StressRow:
    """The result of a stress test of one model.

    Args:
        source: description of the stress test.
        model: `victim`, `purified`, `exact_oracle` or `control`.
        clean_accuracy, attack_success: before it.
        clean_loss: of a language model, which has no accuracy.
        retuned: by the number of triggered examples.
        reactivated: share of triggered examples sent to the attacker under the learnt perturbation.
    """

    source: str
    model: str
    clean_accuracy: float | None
    clean_loss: float | None
    attack_success: float | None
    retuned: tuple[Retuned, ...]
    reactivated: float | None


def stress_rows(store: Store, records: list[Record], rows: "list[Row]") -> tuple[StressRow, ...]:
    """The stress tests of a store.

    Raises:
        UnbackdoorError: a file under `stress/` was not written by `unbackdoor stress`.
    """
    made: list[StressRow] = []
    for record, row in zip(records, rows, strict=True):
        if record.stress is not None:
            seeds = f"victim seed {record.victim_seed}, seed {record.seed}"
            source = f"{row.task}, {row.column}: {row.method}, {row.budget}, {seeds}"
            made += _checked(source, record.stress, f"the cell {record.key}")
    for name in sorted(store.place.names("stress")):
        for file in (f"stress/{name}.json", f"stress/{name}/stress.json"):
            content = store.place.read(file)
            if content is not None:
                try:
                    entry = json.loads(content)
                except (ValueError, RecursionError):
                    entry = None
                made += _checked(name, entry, store.place.path(file))
                break
    return tuple(made)


def _checked(source: str, entry: Any, where: str) -> list[StressRow]:
    try:
        return _rows(source, entry)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        raise UnbackdoorError(
            f"{where} holds no stress test that unbackdoor stress wrote. Remove it to report on the rest."
        ) from None


def _rows(source: str, entry: dict[str, Any]) -> list[StressRow]:
    if entry.get("format", FORMAT) != FORMAT or not entry["before"]:
        raise ValueError("another format")
    rows = []
    for model in MODELS:
        if model not in entry["before"]:
            continue
        before = entry["before"][model]
        values: dict[int, list[float]] = defaultdict(list)
        for run in ((entry.get("retuning") or {}).get(model) or {}).get("runs", ()):
            values[int(run["k"])].append(_value_of(run["attack_success"]))
        reactivation = ((entry.get("reactivation") or {}).get("models") or {}).get(model)
        rows.append(
            StressRow(
                source=source,
                model=model,
                clean_accuracy=None if "clean_loss" in before else _value_of(before["clean_accuracy"]),
                clean_loss=number(before["clean_loss"]["value"]) if "clean_loss" in before else None,
                attack_success=_value_of(before["attack_success"]) if "attack_success" in before else None,
                retuned=tuple(
                    Retuned(k, statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))
                    for k, found in sorted(values.items())
                ),
                reactivated=None if reactivation is None else _value_of(reactivation["triggered_perturbed"]),
            )
        )
    return rows


def _value_of(entry: dict[str, Any]) -> float:
    value = number(entry["value"])
    if not 0 <= value <= 1:
        raise ValueError
    return value
