"""guard.json and guard.safetensors: a schema, one reader and one writer."""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from torch import Tensor

from unbackdoor._artifacts.entries import Count, JsonObject, MethodEntry, ProportionEntry, Versions
from unbackdoor._artifacts.record import Source, written
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import MEBIBYTE, exists, read_file, read_json
from unbackdoor._value import sentence

FORMAT = 1
_ARRAYS = 1024 * MEBIBYTE  # bytes of what a guard fitted

Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class DecisionEntry(JsonObject):
    """A line of decisions.jsonl.

    Args:
        row: number of the input, from 0.
        score: null if there was nothing to score.
        threshold: beyond which scores raise an alarm; null for a guard that changes every input.
        action: the decision.
        reason: in words.
        output: the changed text or the answer, if the action is `clean`.
    """

    row: Count
    score: float | None
    threshold: float | None
    action: Literal["pass", "reject", "clean"]
    reason: str
    output: str | None = None


class ScoreKind(JsonObject):
    """The meaning of a score, in words with its unit, and which scores raise an alarm."""

    measure: str
    suspicious: Literal["low", "high", "all"]


class FalseAlarms(JsonObject):
    """The share of false alarms that was asked for, and the number of clean examples that set the threshold."""

    asked: Annotated[float, Field(gt=0, lt=1)]
    n: Count


class CleanHalves(JsonObject):
    """The clean examples: their number, and those of each half."""

    n: Count
    fitted_on: Count
    threshold_on: Count


class IdentityEntry(JsonObject):
    """The SHA-256 of what the guard was fitted to; null for what it does not have."""

    model: Hash
    tokenizer: Hash | None
    processor: Hash | None
    reference: Hash | None
    template: Hash | None = None


class ArraysFile(JsonObject):
    """The file of the arrays, next to guard.json, and its SHA-256."""

    file: str
    sha256: Hash


class GuardRecord(JsonObject):
    """guard.json; docs/architecture.md explains each key."""

    format: Literal[1]
    guard: MethodEntry
    task: Literal["classification", "generation"]
    modality: Literal["images", "text", "conversations"]
    score: ScoreKind
    threshold: float | None
    false_alarms: FalseAlarms | None
    clean: CleanHalves
    suspect_accuracy_on_clean: ProportionEntry | None
    identity: IdentityEntry
    head: str
    max_length: Count | None
    texts: Annotated[int, Field(ge=1, le=2)] | None = None
    max_new_tokens: Count | None = None
    template: str | None = None
    seed: Count
    seconds: float
    device: str
    versions: Versions
    notes: list[str]
    warnings: list[str]
    arrays: ArraysFile
    source: Source | None = None
    command: str | None = None
    files: list[str] = Field(default_factory=list)


def write_guard(folder: Path, content: dict[str, Any], arrays: dict[str, Tensor]) -> dict[str, Any]:
    """Writes both files into a directory.

    Args:
        folder: the directory.
        content: of the record, without `format`, `arrays` and `files`.
        arrays: what the guard fitted.

    Returns:
        The content of the record.
    """
    from safetensors.torch import save

    stored = save({name: array.contiguous() for name, array in arrays.items()})
    (folder / "guard.safetensors").write_bytes(stored)
    file = {"file": "guard.safetensors", "sha256": hashlib.sha256(stored).hexdigest()}
    return written(folder / "guard.json", {"format": FORMAT, **content, "arrays": file}, GuardRecord.model_validate)


def read_guard(folder: Path) -> tuple[GuardRecord, dict[str, Tensor]]:
    """Reads the record and the arrays of a directory.

    Raises:
        UnbackdoorError: a file is missing, is not what this version of unbackdoor or an earlier one wrote, or the
            arrays are not the recorded ones.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / "guard.json"
    try:
        record = GuardRecord.model_validate(read_json(path))
    except ValidationError as problem:
        raise UnbackdoorError(
            f"{path} is not a guard.json that unbackdoor wrote ({sentence(problem).rstrip('.')}). Fit the guard again, "
            "or take the version of unbackdoor that wrote it."
        ) from None
    arrays = folder / "guard.safetensors"
    if not exists(arrays):
        raise UnbackdoorError(f"{path} needs {arrays.name} in the same directory, but it is missing. Copy both.")
    stored = read_file(arrays, _ARRAYS)
    if hashlib.sha256(stored).hexdigest() != record.arrays.sha256:
        raise UnbackdoorError(f"{arrays} is not the file that {path.name} was written with. Copy both again.")
    try:
        return record, load(stored)
    except SafetensorError as problem:
        raise UnbackdoorError(f"{arrays} is not a safetensors file ({printable(problem)}). Copy it again.") from None
