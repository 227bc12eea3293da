"""record.json: a schema for each of its kinds, one reader and one writer."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from unbackdoor._artifacts.entries import (
    AnswerLossEntry,
    AttackEntry,
    ClassEntry,
    Count,
    ExactShareEntry,
    GenerationScoreEntry,
    ImageTextScoreEntry,
    JsonObject,
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


class CleanExamples(JsonObject):
    """The clean examples of a purification.

    Args:
        n: their number.
        per_class: the number of each class; absent for a language model.
        augment: the augmentation of batches; absent for a language model.
        answer_tokens: of a language model, the number of tokens of all answers.
        template: of a language model, how the prompts were rendered.
        held_out: the number that a selection held out.
    """

    n: Count
    per_class: list[Count] | None = None
    augment: dict[str, Any] | None = None
    answer_tokens: Count | None = None
    template: str | None = None
    held_out: Count


class RecipeEntry(JsonObject):
    """The optimizer, learning rate and batch size of a method that leaves them open."""

    optimizer: str
    learning_rate: float
    batch_size: int


class Source(JsonObject):
    """File names of the suspect, the base and the factory, without their directories; was an adapter merged?"""

    model: str
    base: str | None = None
    merged: bool | None = None
    factory: str | None


class ScoresBeforeAndAfter(JsonObject):
    """The scores of the suspect and of the purified model."""

    suspect: ScoreEntry | GenerationScoreEntry | ImageTextScoreEntry
    purified: ScoreEntry | GenerationScoreEntry | ImageTextScoreEntry


class EvidenceEntry(JsonObject):
    """A shortcut that an audit found.

    Args:
        detector: that found it.
        target: its class.
        moved: the unseen examples that its trigger moves to the class; null if it has none.
        random: those that a random trigger of its size moves.
        nominal_p: how likely it is in a clean model, if the detector's assumptions hold.
        p_value: the same, measured on clean models; null if none can be compared.
    """

    detector: str
    target: ClassEntry
    moved: ExactShareEntry | None
    random: ExactShareEntry | None
    nominal_p: Share
    p_value: Share | None


class AuditSummary(JsonObject):
    """An audit in brief: its verdict, the reason, and the shortcuts that counted."""

    verdict: Literal["shortcut-found", "nothing-found", "cannot-judge"]
    reason: str
    shortcuts: list[EvidenceEntry]


class ShortcutLeft(JsonObject):
    """How many held-out examples a shortcut of the suspect, and a random trigger of its size, move in a result."""

    detector: str
    moved: ExactShareEntry
    random: ExactShareEntry


class TriedEntry(JsonObject):
    """A method that `auto` tried.

    Args:
        method: with all of its fields.
        refused: why it gave no result; null if it did.
        lost: share of the held-out examples, by accuracy; null without a result.
        shortcuts_left: the shortcuts of the suspect that have a trigger, tried on the result.
        audit: of the result; null if it did not pass even without one.
        seconds: of the method.
        warnings: of the method.
    """

    method: MethodEntry
    refused: str | None
    lost: Annotated[float, Field(ge=-1, le=1)] | None
    shortcuts_left: list[ShortcutLeft]
    audit: AuditSummary | None = None
    seconds: float
    warnings: list[str]


class ChoiceEntry(JsonObject):
    """The grounds on which `auto` decided.

    Args:
        max_loss: points of accuracy that a result might lose.
        held_out: the number of examples that this was counted on.
        audit: of the suspect.
        tried: the methods in their order.
        not_tried: those that were not needed, by name, with the settings that are not its defaults.
        kept: likewise, the method whose result was kept; null if the suspect was handed back.
        kept_number: its place in `tried`, from 0; null likewise. Absent in older records, which have names alone.
        passed: whether the result passed its tests; false also if the suspect was handed back; null if the audit of the
            suspect found no shortcut that could test a result. Absent in older records.
        reason: in words.
        audit_of_the_result: null if the suspect was handed back.
    """

    max_loss: float
    held_out: Count
    audit: AuditSummary
    tried: list[TriedEntry]
    not_tried: list[str]
    kept: str | None
    kept_number: Count | None = None
    passed: bool | None = None
    reason: str
    audit_of_the_result: AuditSummary | None


class PurificationRecord(JsonObject):
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
    suspect_accuracy_on_clean: ProportionEntry | None = None
    purified_accuracy_on_clean: ProportionEntry | None = None
    suspect_clean_loss_on_clean: AnswerLossEntry | None = None
    purified_clean_loss_on_clean: AnswerLossEntry | None = None
    usable: bool | None
    unlabelled: Count | None = None
    examples_seen: Count
    choice: ChoiceEntry | None = None
    notes: list[str]
    warnings: list[str]
    source: Source
    encode: Any = None
    scores: ScoresBeforeAndAfter | None
    scores_note: str
    files: list[str] = Field(default_factory=list)


class VictimScores(JsonObject):
    """The score of the victim."""

    victim: ScoreEntry | GenerationScoreEntry | ImageTextScoreEntry


class VictimRecord(JsonObject):
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
    lora_rank: Count | None = None
    adapter: bool | None = None
    freeze_text: bool | None = None
    versions: Versions
    device: str
    seconds: float
    peak_memory_bytes: Count
    examples_seen: Count
    encode: dict[str, Any] | None = None
    scores: VictimScores
    implanted: bool | None
    files: list[str] = Field(default_factory=list)


class DataEntry(JsonObject):
    """The examples of a training: their number, and that of each class."""

    n: Count
    per_class: list[Count]


class SuspectsEntry(JsonObject):
    """The rows that a trainer distrusts; they are in suspects.parquet.

    Args:
        n: their number.
        measure: what their scores are.
        poisoned: the number of poisoned rows in the data; null if it is not known.
        precision: share of the distrusted rows that are poisoned; null if that is not known, or there are none.
        recall: share of the poisoned rows that are distrusted; likewise.
    """

    n: Count
    measure: str
    poisoned: Count | None
    precision: ProportionEntry | None
    recall: ProportionEntry | None


class TrainedScores(JsonObject):
    """The score of a trained model."""

    trained: ScoreEntry | ImageTextScoreEntry


class TrainingRecord(JsonObject):
    """record.json of a model that `train` made; docs/architecture.md explains each key."""

    trainer: MethodEntry
    command: str | None = None
    data: DataEntry
    clean: Count | None
    arch: str
    width: int
    epochs: int
    learning_rate: float
    batch_size: int
    seed: Count
    versions: Versions
    device: str
    seconds: float
    peak_memory_bytes: Count
    examples_seen: Count
    encode: Any
    accuracy_on_data: ProportionEntry
    suspects: SuspectsEntry | None
    notes: list[str]
    warnings: list[str]
    scores: TrainedScores | None
    scores_note: str
    files: list[str] = Field(default_factory=list)


class DemoRecord(JsonObject):
    """record.json of a demo, whose model directories have records of their own."""

    demo: str
    attack: AttackEntry
    rate: Share
    methods: list[MethodEntry]
    seed: Count
    versions: Versions
    device: str
    scores: dict[str, ScoreEntry | GenerationScoreEntry]
    notes: list[str]
    warnings: list[str]
    usable: bool | None
    command: str
    files: list[str] = Field(default_factory=list)


Record = PurificationRecord | VictimRecord | TrainingRecord | DemoRecord | StressRecord


def check_record(content: dict[str, Any]) -> Record:
    """Returns the record in a JSON object; a key that only one kind has decides which kind it is.

    Raises:
        ValidationError: an entry is missing, unknown or of another type.
    """
    schema: type[Record] = VictimRecord
    kinds: dict[str, type[Record]] = {
        "trainer": TrainingRecord,
        "demo": DemoRecord,
        "method": PurificationRecord,
        "before": StressRecord,
    }
    for key, kind in kinds.items():
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


def recorded_seconds(folder: Path) -> float | None:
    """Returns the seconds that the model in a directory was trained or purified for; None without such a record.

    Raises:
        UnbackdoorError: `record.json` holds no JSON object.
    """
    path = folder / "record.json"
    if not path.is_file():
        return None
    try:
        record = check_record(read_json(path))
    except ValidationError:  # of another program
        return None
    return None if isinstance(record, DemoRecord) else record.seconds


def handed_back(record: dict[str, Any]) -> bool:
    """Whether the model of a record is the suspect as it was: a method that chooses among others kept none."""
    choice = record.get("choice")
    return choice is not None and choice["kept"] is None and isinstance(record["method"]["parameters"], dict)


def failed(record: dict[str, Any]) -> bool:
    """Whether the method of a record says itself that its result did not pass, or that it is the suspect as it was."""
    choice = record.get("choice")
    return choice is not None and choice.get("passed") is False and isinstance(record["method"]["parameters"], dict)


def last_name(source: str | Path) -> str:
    """Returns the name of a model without its directories, for records; of `.` that of the directory.

    >>> last_name("owner/model"), last_name("models/tuned/../first/")
    ('model', 'first')
    """
    return Path(os.path.abspath(source)).name


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
