"""The guards of a store, one row for each share of false alarms."""

import json
from collections import defaultdict
from collections.abc import Iterable

from unbackdoor._artifacts.cell import GuardedEntry, GuardScoreEntry, PromptGuardScoreEntry
from unbackdoor._reports.store.numbers import GuardRow, Spread
from unbackdoor._reports.store.records import Record
from unbackdoor._reports.store.settings import Names, Setting


def guard_rows(records: list[Record], names: Names) -> tuple[GuardRow, ...]:
    """Returns the rows of the cells that measure guards.

    Args:
        records: these cells.
        names: short names, also of what is in them.
    """
    settings: dict[Setting, list[Record]] = defaultdict(list)
    for record in records:
        settings[Setting.of(record)].append(record)
    return tuple(
        _row(names.labels(setting), settings[setting], share)
        for setting in sorted(settings, key=names.order)
        for share in _shares(setting)
    )


def _shares(setting: Setting) -> list[float | None]:
    """The shares of false alarms of a cell, which are part of its identity."""
    return json.loads(setting.method).get("false_alarms") or [None]


def _row(labels: tuple[str, str, float | None, str, str], records: list[Record], share: float | None) -> GuardRow:
    task, attack, rate, budget, guard = labels
    finished = [record for record in records if record.message is None]
    counted = [record for record in finished if record.implanted is not False]
    entries = [entry for record in counted if (entry := _at(record, share)) is not None]
    scores = [entry.score for entry in entries]
    of_classes = [score for score in scores if isinstance(score, GuardScoreEntry)]
    of_prompts = [score for score in scores if isinstance(score, PromptGuardScoreEntry)]
    clean = [score.false_alarms for score in of_classes] + [score.answers_kept for score in of_prompts]
    return GuardRow(
        task=task,
        attack=attack,
        rate=rate,
        budget=budget,
        guard=guard,
        control=records[0].control,
        asked=share,
        missed=Spread.of_shares(score.missed_attacks for score in scores),
        false_alarms=Spread.of_shares(score.false_alarms for score in scores),
        area=Spread.of_shares(score.auc for score in scores),
        attack_success=Spread.of_shares(score.attack_success for score in scores),
        attack_success_without=Spread.of_shares(score.attack_success_without_guard for score in scores),
        accuracy=Spread.of_shares(score.accuracy_of_what_passes for score in of_classes),
        accuracy_without=Spread.of_shares(score.accuracy_without_guard for score in of_classes),
        answers_kept=Spread.of_shares(score.answers_kept for score in of_prompts),
        forwards=Spread.of(score.forwards_per_input.value for score in scores),
        reference_forwards=Spread.of(score.forwards_per_input.reference for score in scores),
        clean_n=_first(entry.n for entry in clean),
        triggered_n=_first(score.missed_attacks.n for score in scores if score.missed_attacks is not None),
        counted=len(counted),
        not_implanted=len(finished) - len(counted),
        failed=len(records) - len(finished),
        messages=tuple(dict.fromkeys(record.message for record in records if record.message is not None)),
        seeds=tuple(sorted({record.seed for record in counted})),
        victim_seeds=tuple(sorted({record.victim_seed for record in counted if record.victim_seed is not None})),
    )


def _at(record: Record, share: float | None) -> GuardedEntry | None:
    """The numbers of a cell at a share of false alarms."""
    entries = [] if record.guard is None else record.guard.at
    return next((entry for entry in entries if entry.false_alarms == share), None)


def _first(numbers: Iterable[int]) -> int | None:
    return next(iter(numbers), None)
