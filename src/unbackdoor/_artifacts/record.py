"""record.json: a schema for each of the three kinds, one reader and one writer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from unbackdoor._artifacts.entries import (
    AttackEntry,
    Count,
    Entry,
    MethodEntry,
    ProportionEntry,
    ScoreEntry,
    Share,
    Versions,
)
from unbackdoor._artifacts.stress_record import StressRecord
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inputs import read_json
from unbackdoor._value import sentence


class CleanExamples(Entry):
    """The clean examples of a purification.

    Args:
        n: their number.
        per_class: the number of each class.
        augment: the augmentation of batches.
        held_out: the number that a selection held out.
    """

    n: Count
    per_class: list[Count]
    augment: dict[str, Any]
    held_out: Count


class RecipeEntry(Entry):
    """The optimizer, learning rate and batch size of a method that leaves them open."""

    optimizer: str
    learning_rate: float
    batch_size: int


class Source(Entry):
    """File names of the suspect, the base and the factory, without their directories."""

    model: str
    base: str | None = None
    factory: str | None


class ScoresBeforeAndAfter(Entry):
    """The scores of the suspect and of the purified model."""

    suspect: ScoreEntry
    purified: ScoreEntry


class PurificationRecord(Entry):
    """record.json of a purified model; docs/architecture.md explains each key."""

    method: MethodEntry
    command: str | None = None
    seed: Count
    versions: Versions
    device: str
    seconds: float
    peak_memory_bytes: Count
    head: str | None
    clean: CleanExamples | None
    recipe: RecipeEntry | None
    suspect_accuracy_on_clean: ProportionEntry | None
    purified_accuracy_on_clean: ProportionEntry | None
    usable: bool | None
    examples_seen: Count
    notes: list[str]
    warnings: list[str]
    source: Source
    encode: Any = None
    scores: ScoresBeforeAndAfter | None
    scores_note: str
    files: list[str] = Field(default_factory=list)


class VictimScores(Entry):
    """The score of the victim."""

    victim: ScoreEntry


class VictimRecord(Entry):
    """record.json of a victim; docs/architecture.md explains each key."""

    attack: AttackEntry
    rate: Share
    arch: str
    width: int
    epochs: int
    clean_epochs: Count = 0
    learning_rate: float
    batch_size: int
    seed: Count
    versions: Versions
    device: str
    seconds: float
    peak_memory_bytes: Count
    examples_seen: Count
    encode: dict[str, Any] | None = None
    scores: VictimScores
    implanted: bool | None
    files: list[str] = Field(default_factory=list)


class DemoRecord(Entry):
    """record.json of a demo, whose model directories have records of their own."""

    demo: str
    attack: AttackEntry
    rate: Share
    methods: list[MethodEntry]
    seed: Count
    versions: Versions
    device: str
    scores: dict[str, ScoreEntry]
    notes: list[str]
    warnings: list[str]
    usable: bool | None
    command: str
    files: list[str] = Field(default_factory=list)


Record = PurificationRecord | VictimRecord | DemoRecord | StressRecord


def check_record(content: dict[str, Any]) -> Record:
    """Returns the record in a JSON object; a key that only one kind has decides which kind it is.

    Raises:
        ValidationError: an entry is missing, unknown or of another type.
    """
    schema: type[Record] = VictimRecord
    for key, kind in (("demo", DemoRecord), ("method", PurificationRecord), ("before", StressRecord)):
        schema = kind if key in content else schema
    return schema.model_validate(content)


def read_record(path: Path) -> Record:
    """Reads the record of a directory.

    Args:
        path: `record.json` or `stress.json`.

    Raises:
        UnbackdoorError: the file is not a record of this version of unbackdoor or an earlier one.
    """
    try:
        return check_record(read_json(path))
    except ValidationError as problem:
        raise UnbackdoorError(
            f"{path} is not a record that unbackdoor wrote ({sentence(problem).rstrip('.')}). Write it again, or take "
            "the version of unbackdoor that wrote it."
        ) from None


def write_record(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write a record as the last file of a directory, with a list of all files.

    Args:
        path: `record.json` or `stress.json` in the directory.
        content: content of the record.

    Returns:
        The content with that list, under `files`.
    """
    return written(path, content, check_record)


def written(path: Path, content: dict[str, Any], check: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Writes a JSON object with the list of all files in its directory, if it passes a check.

    Args:
        path: of the file.
        content: without that list.
        check: raises an error for what does not fit the schema.
    """
    folder = path.parent
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()}
    complete = {**content, "files": sorted({*files, path.name})}
    check(complete)
    path.write_text(json.dumps(complete, indent=2) + "\n", encoding="utf-8")
    return complete
