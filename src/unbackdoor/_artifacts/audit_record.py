"""audit.json: its schema, its reader and its writer."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, RootModel, ValidationError

from unbackdoor._artifacts.entries import (
    AnswerLossEntry,
    ClassEntry,
    Count,
    ExactShareEntry,
    JsonObject,
    ProportionEntry,
    Share,
    Versions,
)
from unbackdoor._artifacts.record import Source, written
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inputs import read_json
from unbackdoor._value import sentence


class EvidenceRows(RootModel[list[Count]]):
    """rows.json of a piece of evidence: the rows of the data, from 0, on which its trigger was judged."""


class Budget(JsonObject):
    """The size of a trigger, and its unit in words."""

    size: Annotated[float, Field(ge=0)]
    unit: str


class Abnormality(JsonObject):
    """How rare a shortcut is in clean models.

    Args:
        p_value: measured on clean models; null if none can be compared.
        calibration: the clean models, or why there are none.
        nominal_p: under the detector's own assumptions.
    """

    p_value: Share | None
    calibration: str
    nominal_p: Share


class ShortcutEntry(JsonObject):
    """A shortcut to one class, judged on held-out examples.

    Args:
        target: its class.
        sources: the only classes that it moves; absent for all.
        moved: the held-out examples that its trigger moves; null if it has no trigger.
        random: those that a random trigger of the same size moves; null if there is none.
        budget: the size of its trigger; null if it has none.
        abnormality: how rare it is in clean models.
    """

    target: ClassEntry
    sources: list[ClassEntry] | None = None
    moved: ExactShareEntry | None
    random: ExactShareEntry | None
    budget: Budget | None
    abnormality: Abnormality


class FindingEntry(ShortcutEntry):
    """The result of one detector: its strongest shortcut.

    Args:
        detector: its name.
        alarm: whether the shortcut is as rare as an alarm asks for, and does not look natural.
        looks_natural: whether it looks like a feature of its class; null if that is not known.
        targets: what the shortcuts of a language model lead to: an answer, or a layer; absent for a class.
        classes: the shortcuts to all classes, the strongest among them.
        evidence: files that show and repeat it, next to audit.json.
    """

    detector: str
    alarm: bool
    looks_natural: bool | None
    targets: Literal["answer", "layer"] | None = None
    classes: list[ShortcutEntry]
    evidence: list[str] = Field(default_factory=list)


class SearchedEntry(JsonObject):
    """A detector that ran: its settings, its seconds, and what it cannot see."""

    detector: str
    parameters: dict[str, Any]
    seconds: float
    cannot_see: str


class NotSearchedEntry(JsonObject):
    """A detector that did not run, and why."""

    detector: str
    reason: str


class Calibration(JsonObject):
    """The clean models that p-values come from."""

    n: Count
    description: str


class OperatingPoint(JsonObject):
    """Measured rates of this very configuration: alarms on clean models and on models with a backdoor."""

    false_alarms: ProportionEntry
    detections: ProportionEntry
    models: str


class ExamplesEntry(JsonObject):
    """The examples: their number, those of each half, and whether their labels were given."""

    n: Count
    searched_on: Count
    judged_on: Count
    labelled: bool


class AuditRecord(JsonObject):
    """audit.json; docs/architecture.md explains each key."""

    format: Literal[1]
    verdict: Literal["shortcut-found", "nothing-found", "cannot-judge"]
    reason: str
    findings: list[FindingEntry]
    searched: list[SearchedEntry]
    not_searched: list[NotSearchedEntry]
    calibration: Calibration | None
    operating_point: OperatingPoint | None
    operating_point_note: str
    examples: ExamplesEntry
    unlabelled: Count | None
    classes: Count
    suspect_accuracy_on_clean: ProportionEntry | None
    suspect_clean_loss_on_clean: AnswerLossEntry | None = None
    seed: Count
    seconds: float
    device: str
    versions: Versions
    notes: list[str]
    source: Source | None = None
    command: str | None = None
    repeat: str | None = None
    files: list[str] = Field(default_factory=list)


def read_audit(path: Path) -> AuditRecord:
    """Reads the record of an audit.

    Args:
        path: `audit.json`.

    Raises:
        UnbackdoorError: it is not a record of this version of unbackdoor or an earlier one.
    """
    try:
        return AuditRecord.model_validate(read_json(path))
    except ValidationError as problem:
        raise UnbackdoorError(
            f"{path} is not an audit.json that unbackdoor wrote ({sentence(problem).rstrip('.')}). Audit again, or "
            "take the version of unbackdoor that wrote it."
        ) from None


def write_audit(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Writes the record of an audit as the last file of a directory, with the list of all that is there.

    Args:
        path: `audit.json` in the directory.
        content: of the record.

    Returns:
        The content with that list, under `files`.
    """
    return written(path, content, AuditRecord.model_validate)
