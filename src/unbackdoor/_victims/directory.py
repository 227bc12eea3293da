"""A victim as a directory: model, record, card and trigger."""

import os
from pathlib import Path

import torch

from unbackdoor._artifacts import card
from unbackdoor._artifacts.record import write_record
from unbackdoor._data.writing import write_parquet
from unbackdoor._models.saving import save
from unbackdoor._poisoning.attack_file import save_trigger
from unbackdoor._victims.plant import Victim


def write_victim(
    victim: Victim, folder: Path, *, source: os.PathLike[str] | None = None, with_data: bool = False
) -> None:
    """Write a victim's model directory, its record, its card and its trigger.

    Args:
        victim: the victim.
        folder: an existing, empty directory.
        source: the directory of its base.
        with_data: also write poisoned.parquet, the training data that it saw.
    """
    if with_data and victim.poisoned is not None:
        data, rows, _, _ = victim.poisoned
        poisoned = torch.isin(torch.arange(len(data)), rows).tolist()
        write_parquet(folder / "poisoned.parquet", data, poisoned)
    save(victim.model, folder, source=source, encode=victim.encode)
    (folder / "README.md").write_text(card.victim(victim.record), encoding="utf-8")
    save_trigger(folder, victim.description, {} if victim.trigger is None else victim.trigger.arrays)
    write_record(folder / "record.json", victim.record)
