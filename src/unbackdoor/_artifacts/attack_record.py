"""attack.json: its schema."""

from typing import Literal

from unbackdoor._artifacts.entries import AttackEntry, Count, Entry, Share


class TriggerFile(Entry):
    """The file of the trigger's arrays, next to attack.json, and its SHA-256."""

    file: str
    sha256: str


class AttackRecord(Entry):
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
    trigger: TriggerFile
    sha256: str | None = None
