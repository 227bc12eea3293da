"""Stress tests in a store: within cells, or as `stress/NAME.json` or `stress/NAME/stress.json`."""

import statistics
from collections import defaultdict

from unbackdoor._artifacts.stress_record import NamedScore, StressRecord
from unbackdoor._bench import Store
from unbackdoor._errors import UnbackdoorError
from unbackdoor._reports.store.numbers import RetunedSpread, Row, StressRow
from unbackdoor._reports.store.records import Record, number

MODELS = ("victim", "purified", "exact_oracle", "control")


def stress_rows(store: Store, records: list[Record], rows: list[Row]) -> tuple[StressRow, ...]:
    """The stress tests of a store.

    Raises:
        UnbackdoorError: a file under `stress/` was not written by `unbackdoor stress`.
    """
    tested: list[StressRow] = []
    for record, row in zip(records, rows, strict=True):
        if record.stress is not None:
            seeds = f"victim seed {record.victim_seed}, seed {record.seed}"
            source = f"{row.task}, {row.column}: {row.method}, {row.budget}, {seeds}"
            tested += _checked(source, record.stress, f"the cell {record.key}")
    for name in sorted(store.place.names("stress")):
        for file in (f"stress/{name}.json", f"stress/{name}/stress.json"):
            content = store.place.read(file)
            if content is not None:
                tested += _checked(name, content, store.place.path(file))
                break
    return tuple(tested)


def _checked(source: str, written: StressRecord | bytes, where: str) -> list[StressRow]:
    try:
        if isinstance(written, bytes):
            written = StressRecord.model_validate_json(written, strict=True)
        return _rows(source, written)
    except ValueError:  # pydantic's is one
        raise UnbackdoorError(
            f"{where} holds no stress test that unbackdoor stress wrote. Remove it to report on the rest."
        ) from None


def _rows(source: str, record: StressRecord) -> list[StressRow]:
    """Returns a row for each model that was tested.

    Raises:
        ValueError: a loss is not finite.
    """
    rows = []
    for model in MODELS:
        if model not in record.before:
            continue
        before = record.before[model]
        values: dict[int, list[float]] = defaultdict(list)
        retuning = (record.retuning or {}).get(model)
        for run in () if retuning is None else retuning.runs:
            if run.attack_success is not None:
                values[run.k].append(run.attack_success.value)
        accuracy, loss = None, None
        if isinstance(before, NamedScore):
            accuracy = before.clean_accuracy.value
        elif before.clean_loss is not None:
            loss = number(before.clean_loss.value)
        reach = None if record.reactivation is None else record.reactivation.models.get(model)
        rows.append(
            StressRow(
                source=source,
                model=model,
                clean_accuracy=accuracy,
                clean_loss=loss,
                attack_success=None if before.attack_success is None else before.attack_success.value,
                retuned=tuple(
                    RetunedSpread(
                        k,
                        statistics.fmean(successes),
                        statistics.stdev(successes) if len(successes) > 1 else None,
                        len(successes),
                    )
                    for k, successes in sorted(values.items())
                ),
                reactivated=None if reach is None else reach.triggered_perturbed.value,
            )
        )
    return rows
