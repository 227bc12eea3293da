"""attack.json: the planted attack, the poisoned rows, and the arrays of the trigger."""

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from unbackdoor._artifacts.attack_record import (
    FORMAT,
    AttackRecord,
    TriggerEntry,
    read_attack_record,
    was_changed,
    write_attack_record,
)
from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import MEBIBYTE, exists, read_file, read_json, reader
from unbackdoor._models.untrusted_weights import check_finite
from unbackdoor._poisoning.abilities import is_learnt, phrases_of, place_of, test_time_of, train_time_of
from unbackdoor._poisoning.attack import Attack
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._poisoning.check import check_value
from unbackdoor._poisoning.poison import Poisoned
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._registry.attacks import EVIDENCE, REGISTRY
from unbackdoor._registry.entries import find, name_of, to_json
from unbackdoor._value import fields_of

_ARRAYS = 1024 * MEBIBYTE  # bytes of a trigger: a few pictures or texts


def describe(poisoned: Poisoned, *, rate: float, seed: int, implanted: bool | None) -> dict[str, Any]:
    """Returns the content of `attack.json` without the file of the arrays."""
    attack = poisoned.trigger.attack
    return {
        "format": FORMAT,
        "attack": to_json(attack, REGISTRY),
        **_wanted(poisoned.trigger),
        "train_time": train_time_of(attack),
        "test_time": test_time_of(attack),
        "rate": rate,
        "seed": seed,
        "n": len(poisoned.data),
        "rows": _in_source(poisoned.data, poisoned.rows),
        "cover_rows": _in_source(poisoned.data, poisoned.cover),
        "implanted": implanted,
    }


def _wanted(trigger: Trigger) -> dict[str, Any]:
    """The attacker's aim: a class by a rule; or a behaviour, and then also the trigger in words."""
    attack, behaviour = trigger.attack, trigger.behaviour
    if behaviour is None:
        return {"label_rule": attack.label_rule, "target": attack.target}
    words = {"kind": name_of(attack, REGISTRY), "words": list(phrases_of(attack)), "place": place_of(attack)}
    return {"trigger": words, "behaviour": fields_of(behaviour)}


def describe_found(trigger: Trigger) -> dict[str, Any]:
    """Returns the content of the `attack.json` of a trigger that an audit found, but for the hash of the arrays."""
    attack = trigger.attack
    return {
        "format": FORMAT,
        "attack": to_json(attack, (*REGISTRY, *EVIDENCE)),
        **_wanted(trigger),
        "train_time": "not known: an audit found the trigger",
        "test_time": test_time_of(attack),
        "implanted": None,
    }


def _in_source(data: Dataset, rows: Tensor) -> list[int]:
    """Row numbers in the file that the data was read from."""
    numbers: list[int] = (rows if data.rows is None else data.rows[rows]).tolist()
    return numbers


def save_trigger(folder: Path, description: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    """Write `attack.json` and `trigger.safetensors` into a directory."""
    from safetensors.torch import save

    content = save({name: array.contiguous() for name, array in arrays.items()})
    (folder / "trigger.safetensors").write_bytes(content)
    words = description.get("trigger", {})
    trigger = TriggerEntry(file="trigger.safetensors", sha256=hashlib.sha256(content).hexdigest(), **words)
    write_attack_record(folder / "attack.json", description, trigger)


@reader("path")
def load_trigger(path: str | Path) -> Trigger:
    """Rebuild the trigger of an `attack.json`, exactly.

    Raises:
        UnbackdoorError: the file is missing, of a newer version or changed by hand, or its arrays are not the recorded
            ones.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    path = path / "attack.json" if path.is_dir() else path
    record = read_attack_record(path)
    arrays_path = path.parent / Path(record.trigger.file).name
    if not exists(arrays_path):
        raise UnbackdoorError(f"{path} needs {arrays_path.name} in the same directory, but it is missing. Copy both.")
    stored = read_file(arrays_path, _ARRAYS)
    if hashlib.sha256(stored).hexdigest() != record.trigger.sha256:
        raise UnbackdoorError(f"{arrays_path} is not the file that {path.name} was written with. Copy both again.")
    attack = _attack_class(record.attack.name, path)(**record.attack.parameters)
    for recorded, own in ((record.target, attack.target), (record.label_rule, attack.label_rule)):
        if recorded is not None and recorded != own:
            raise was_changed(path)
    try:
        arrays = load(stored)
    except SafetensorError as problem:
        raise UnbackdoorError(
            f"{arrays_path} is not a safetensors file ({printable(problem)}). Copy it again."
        ) from None
    check_finite(arrays, str(arrays_path))
    wanted = record.behaviour
    return Trigger(attack, arrays, None if wanted is None else Behaviour(kind=wanted.kind, text=wanted.text))


def victim_of(folder: Path) -> str | None:
    """Returns the attack of the victim in a directory; None for a clean control and any other directory."""
    try:
        name = AttackRecord.model_validate(read_json(folder / "attack.json")).attack.name
    except (UnbackdoorError, ValidationError):
        return None
    return None if name == "none" else printable(name)


def _attack_class(name: str, path: Path) -> Any:
    """Returns the class of a recorded attack. The file may come from anybody, so it never imports anything."""
    if ":" not in name:
        return find(name, (*REGISTRY, *EVIDENCE), "attack", "attacks").resolve()
    module, _, attribute = name.partition(":")
    attack_class = getattr(sys.modules.get(module), attribute, None)
    if not (
        isinstance(attack_class, type) and dataclasses.is_dataclass(attack_class) and hasattr(attack_class, "apply")
    ):
        raise UnbackdoorError(
            f"{path} names the attack {printable(name)}, which is not one of unbackdoor's own and is not imported "
            "here. Score it in Python, after importing its class."
        )
    return attack_class


def as_trigger(attack: "Attack | Trigger | str | Path", data: Dataset) -> Trigger:
    """Returns a trigger from a trigger, an attack value, or a path to `attack.json`."""
    if isinstance(attack, str | Path):
        return load_trigger(attack)
    if isinstance(attack, Trigger):
        return attack
    check_value(attack)
    if is_learnt(attack):
        raise UnbackdoorError(
            f"{type(attack).__name__} learns its trigger while it is planted, so its fields alone do not make it. "
            "Score with the victim's attack.json."
        )
    return Trigger.of(attack, data)
