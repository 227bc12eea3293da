"""attack.json: a schema, one reader and one writer."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from unbackdoor._artifacts.entries import AttackEntry, Count, JsonObject, Share
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import RECORD, check_file, exists, read_json

FORMAT = 1


class TriggerEntry(JsonObject):
    """The file of the trigger's arrays, next to attack.json, and its SHA-256; on prompts also the trigger in words.

    Args:
        file: name of the file.
        sha256: hash of its content.
        kind: name of the attack.
        words: the words or phrases.
        place: their place in the prompt.
    """

    file: str
    sha256: str
    kind: str | None = None
    words: list[str] | None = None
    place: str | None = None


class BehaviourEntry(JsonObject):
    """The answer that the attacker wants from a language model."""

    kind: Literal["contains", "starts-with", "equals", "refuses"]
    text: str


class AttackRecord(JsonObject):
    """attack.json; docs/architecture.md explains each key. A clean control's file has no attack and few keys."""

    format: Literal[1]
    attack: AttackEntry
    label_rule: str | None = None
    target: int | None = None
    train_time: str | None = None
    test_time: str | None = None
    rate: Share | None = None
    seed: Count | None = None
    n: Count | None = None
    rows: list[Count] | None = None
    cover_rows: list[Count] | None = None
    implanted: bool | None
    trigger: TriggerEntry
    behaviour: BehaviourEntry | None = None
    sha256: str | None = None


def write_attack_record(path: Path, description: dict[str, Any], trigger: TriggerEntry) -> None:
    """Write an `attack.json`.

    Args:
        path: path of the file.
        description: all other entries.
        trigger: the file of the trigger's arrays, and its hash.
    """
    content = {**description, "trigger": trigger.model_dump(exclude_none=True)}
    content["sha256"] = digest(content)
    AttackRecord.model_validate(content)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_attack_record(path: Path) -> AttackRecord:
    """Read an `attack.json`.

    Raises:
        UnbackdoorError: the file is missing, of a newer version or changed by hand, or something else.
    """
    if not exists(path):
        raise UnbackdoorError(f"{path} does not exist; `attack` takes the attack.json that unbackdoor attack wrote.")
    check_file(path, RECORD)
    foreign = _foreign(path)
    try:
        content = read_json(path)
    except UnbackdoorError:
        raise foreign from None
    version = content.get("format")
    if version is None:
        raise foreign
    if version != FORMAT:
        raise UnbackdoorError(
            f"{path} has format {printable(version)}, this version reads {FORMAT}. Take the version of unbackdoor that "
            "wrote it."
        )
    changed = "sha256" in content and content["sha256"] != digest(content)
    try:
        record = AttackRecord.model_validate(content, strict=True)
    except ValidationError:
        raise was_changed(path) if changed else foreign from None
    if record.attack.name == "none":
        raise UnbackdoorError(f"{path} belongs to a clean control, which has no trigger. Give a victim's attack.json.")
    if changed or record.sha256 is None:
        raise was_changed(path)
    return record


def recorded_implanted(path: Path) -> bool | None:
    """Whether a victim's backdoor implanted, by its `attack.json`; None if that was not measured or the file is absent.

    Raises:
        UnbackdoorError: the file is something else.
    """
    if not path.is_file():
        return None
    try:
        return AttackRecord.model_validate(read_json(path)).implanted
    except ValidationError:
        raise _foreign(path) from None


def _foreign(path: Path) -> UnbackdoorError:
    return UnbackdoorError(f"{path} is not an attack.json that unbackdoor attack wrote. Plant the attack again.")


def was_changed(path: Path) -> UnbackdoorError:
    """Returns the error about an `attack.json` that no longer fits its hash, or contradicts itself."""
    return UnbackdoorError(
        f"{path} was changed after unbackdoor attack wrote it. Take the original, or plant the attack again."
    )


def digest(content: dict[str, Any]) -> str:
    """Returns the hash of an `attack.json` without its own entry, for any order and layout of the keys."""
    plain = json.dumps({key: entry for key, entry in content.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()
