"""attack.json: the planted attack, the poisoned rows, and the arrays of the trigger."""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from unbackdoor._artifacts.attack_record import AttackRecord
from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import MEBIBYTE, RECORD, check_file, exists, read_file, read_json, reader
from unbackdoor._models.untrusted_weights import check_finite
from unbackdoor._poisoning.abilities import is_learnt, test_time_of, train_time_of
from unbackdoor._poisoning.attack import Attack
from unbackdoor._poisoning.poison import Poisoned
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._registry.attacks import EVIDENCE, REGISTRY
from unbackdoor._registry.entries import find, to_json

FORMAT = 1  # of attack.json


_ARRAYS = 1024 * MEBIBYTE  # bytes of a trigger: a few pictures or texts


def describe(poisoned: Poisoned, *, rate: float, seed: int, implanted: bool | None) -> dict[str, Any]:
    """The content of `attack.json`, but for the hash of the arrays."""
    attack = poisoned.trigger.attack
    return {
        "format": FORMAT,
        "attack": to_json(attack, REGISTRY),
        "label_rule": attack.label_rule,
        "target": attack.target,
        "train_time": train_time_of(attack),
        "test_time": test_time_of(attack),
        "rate": rate,
        "seed": seed,
        "n": len(poisoned.data),
        "rows": _in_source(poisoned.data, poisoned.rows),
        "cover_rows": _in_source(poisoned.data, poisoned.cover),
        "implanted": implanted,
    }


def describe_found(trigger: Trigger) -> dict[str, Any]:
    """Returns the content of the `attack.json` of a trigger that an audit found, but for the hash of the arrays."""
    attack = trigger.attack
    return {
        "format": FORMAT,
        "attack": to_json(attack, (*REGISTRY, *EVIDENCE)),
        "label_rule": attack.label_rule,
        "target": attack.target,
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
    description = {
        **description,
        "trigger": {"file": "trigger.safetensors", "sha256": hashlib.sha256(content).hexdigest()},
    }
    description["sha256"] = _digest(description)
    AttackRecord.model_validate(description)
    (folder / "attack.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _digest(description: dict[str, Any]) -> str:
    """Returns the hash of an `attack.json` without its own entry, for any order and layout of the keys."""
    plain = json.dumps({key: entry for key, entry in description.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


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
    if not exists(path):
        raise UnbackdoorError(f"{path} does not exist; `attack` takes the attack.json that unbackdoor attack wrote.")
    check_file(path, RECORD)
    try:
        content = read_json(path)
        version, name = content["format"], content["attack"]["name"]
        parameters = {str(field): setting for field, setting in content["attack"]["parameters"].items()}
        arrays_path, digest = path.parent / Path(content["trigger"]["file"]).name, content["trigger"]["sha256"]
    except (UnbackdoorError, ValueError, LookupError, TypeError, AttributeError):
        raise UnbackdoorError(
            f"{path} is not an attack.json that unbackdoor attack wrote. Plant the attack again."
        ) from None
    if version != FORMAT:
        raise UnbackdoorError(
            f"{path} has format {printable(version)}, this version reads {FORMAT}. Take the version of unbackdoor that "
            "wrote it."
        )
    changed = UnbackdoorError(
        f"{path} was changed after unbackdoor attack wrote it. Take the original, or plant the attack again."
    )
    if name == "none":
        raise UnbackdoorError(f"{path} belongs to a clean control, which has no trigger. Give a victim's attack.json.")
    if content.get("sha256") != _digest(content):
        raise changed
    if not exists(arrays_path):
        raise UnbackdoorError(f"{path} needs {arrays_path.name} in the same directory, but it is missing. Copy both.")
    stored = read_file(arrays_path, _ARRAYS)
    if hashlib.sha256(stored).hexdigest() != digest:
        raise UnbackdoorError(f"{arrays_path} is not the file that {path.name} was written with. Copy both again.")
    attack = _attack_class(str(name), path)(**parameters)
    recorded = content.get("target", attack.target), content.get("label_rule", attack.label_rule)
    if recorded != (attack.target, attack.label_rule):
        raise changed
    try:
        arrays = load(stored)
    except SafetensorError as problem:
        raise UnbackdoorError(
            f"{arrays_path} is not a safetensors file ({printable(problem)}). Copy it again."
        ) from None
    check_finite(arrays, str(arrays_path))
    return Trigger(attack, arrays)


def victim_of(folder: Path) -> str | None:
    """Returns the attack of the victim in a directory; None for a clean control and any other directory."""
    try:
        name = read_json(folder / "attack.json")["attack"]["name"]
    except (UnbackdoorError, LookupError, TypeError):
        return None
    return None if name == "none" else printable(str(name))


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
    if is_learnt(attack):
        raise UnbackdoorError(
            f"{type(attack).__name__} learns its trigger while it is planted, so its fields alone do not make it. "
            "Score with the victim's attack.json."
        )
    return Trigger.of(attack, data)
