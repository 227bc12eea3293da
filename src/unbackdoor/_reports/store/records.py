"""The cells of a store as the tables need them. A store may come from others, so nothing in it is taken on trust."""

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from unbackdoor._artifacts.cell import Cell, DistrustEntry, Failed, GuardEntry
from unbackdoor._artifacts.entries import (
    AnswerLossEntry,
    GenerationScoreEntry,
    ImageTextScoreEntry,
    ProportionEntry,
    ScoreEntry,
)
from unbackdoor._artifacts.stress_record import StressRecord
from unbackdoor._bench import Store, identity
from unbackdoor._errors import SENTENCE, printable


@dataclass(frozen=True, slots=True)
class Record:
    """One cell.

    Args:
        key: key of the cell.
        task, attack, method, clean: identity of the measurement, as canonical JSON; `attack` has the model, the factory
            and the trigger of an existing one, `method` the proxy.
        victim: the key of the victim.
        control: whether the victim is the clean control.
        implanted: None if it is not known, and for a clean control.
        usable: False if the method cost the model its use; None if it is not known.
        zero_shot: whether the accuracies are those of prompts, of a model of images and texts.
        success, recovered: None without triggered examples.
        flips: flips of a clean control, by the key of a victim.
        loss, false_activation, empty: only of language models, which have no accuracy.
        second_accuracy, second_loss, second_success: on the task's second test examples.
        distrusted: of a trainer, the rows that it distrusts.
        guards: whether it measures a guard in front of the victim, and no other model.
        guard: the guard's numbers.
        message: reason of a failure; None without a failure.
        packed: the whole cell, compressed; None if nobody asked to keep it.
    """

    key: str
    task: str
    attack: str
    method: str
    clean: str
    rate: float | None
    victim: str
    victim_seed: int | None
    seed: int
    control: bool
    message: str | None
    provenance: str
    implanted: bool | None = None
    usable: bool | None = None
    accuracy: ProportionEntry | None = None
    zero_shot: bool = False
    success: ProportionEntry | None = None
    recovered: ProportionEntry | None = None
    label_rule: str | None = None
    flips: dict[str, ProportionEntry] | None = None
    loss: AnswerLossEntry | None = None
    false_activation: ProportionEntry | None = None
    empty: ProportionEntry | None = None
    second_accuracy: ProportionEntry | None = None
    second_loss: AnswerLossEntry | None = None
    second_success: ProportionEntry | None = None
    seconds: float | None = None
    training: float | None = None
    memory: float | None = None
    stress: StressRecord | None = None
    distrusted: DistrustEntry | None = None
    guards: bool = False
    guard: GuardEntry | None = None
    packed: bytes | None = None


def read(store: Store, *, whole: bool) -> Iterator[Record | str]:
    """Yields the records of a store without its audits; for a cell of another form than the schema's only its key.

    Args:
        store: the store with the cells.
        whole: also keep each cell as it is.
    """
    victims: dict[str, str] = {}
    for cell in store.read_cells():
        if isinstance(cell, str):
            yield cell
            continue
        if cell.content.spec.method.name == "audit":  # purifies nothing, so it is in none of the tables
            continue
        try:
            record = _record(cell.content, cell.spec, victims)
        except (LookupError, TypeError, ValueError):
            yield identity(cell.spec)
        else:
            content = canonical({"spec": cell.spec, "result": cell.result}) if whole else None
            yield record if content is None else replace(record, packed=zlib.compress(content.encode(), 1))


def unpacked(record: Record) -> str:
    """The whole cell, as compact JSON."""
    assert record.packed is not None
    return zlib.decompress(record.packed).decode()


def canonical(value: Any) -> str:
    """JSON that is equal for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _record(cell: Cell, spec: dict[str, Any], victims: dict[str, str]) -> Record:
    victim, result = spec["victim"], cell.result
    text = canonical(victim)
    if text not in victims:
        victims[text] = identity(victim)
    attack = {**victim["attack"], **{name: victim[name] for name in ("model", "factory", "trigger") if name in victim}}
    method = {**spec["method"], **({"proxy": spec["proxy"]} if "proxy" in spec else {})}
    if not isinstance(victim["task"]["name"], str):
        raise TypeError
    if spec["clean"] is not None:
        int(spec["clean"]["n"])
    common: dict[str, Any] = {
        "key": identity(spec),
        "task": canonical(victim["task"]),
        "attack": canonical(attack),
        "method": canonical(method),
        "clean": canonical(spec["clean"]),
        "rate": None if cell.spec.victim.rate is None else number(cell.spec.victim.rate),
        "victim": victims[text],
        "victim_seed": cell.spec.victim.seed,
        "seed": cell.spec.seed,
        "control": cell.spec.victim.attack.name == "none",
        "guards": cell.spec.method.kind == "guard",
        "provenance": canonical(result.provenance.model_dump(exclude_unset=True)),
    }
    if isinstance(result, Failed):
        return Record(**common, message=printable(result.message, SENTENCE))
    second = result.second_test
    return Record(
        **common,
        message=None,
        implanted=result.implanted,
        usable=result.usable,
        success=result.score.attack_success,
        flips=result.flips,
        **_scored(result.score),
        second_accuracy=None if second is None else _accuracy(second),
        second_loss=second.clean_loss if isinstance(second, GenerationScoreEntry) else None,
        second_success=None if second is None else second.attack_success,
        seconds=number(result.seconds),
        training=None if result.training_seconds is None else number(result.training_seconds),
        memory=None if result.peak_memory_bytes is None else float(result.peak_memory_bytes),
        stress=result.stress,
        distrusted=result.distrusted,
        guard=result.guard,
    )


_Score = ScoreEntry | GenerationScoreEntry | ImageTextScoreEntry


def _accuracy(score: _Score) -> ProportionEntry | None:
    """The clean accuracy of a score; None of a language model, and of pairs without labels."""
    if isinstance(score, ImageTextScoreEntry):
        return score.zero_shot_accuracy
    return score.clean_accuracy if isinstance(score, ScoreEntry) else None


def _scored(score: _Score) -> dict[str, Any]:
    """The parts that the score of a language model does not have, or that no other has."""
    if isinstance(score, GenerationScoreEntry):
        return {"loss": score.clean_loss, "false_activation": score.false_activation, "empty": score.empty}
    return {
        "accuracy": _accuracy(score),
        "zero_shot": isinstance(score, ImageTextScoreEntry),
        "recovered": score.recovered_accuracy,
        "label_rule": None if score.label_rule is None else printable(score.label_rule),
    }


def number(raw: Any) -> float:
    """Returns a finite number, or raises a ValueError."""
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw):
        raise ValueError
    return float(raw)
