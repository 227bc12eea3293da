"""The cells of a store as the tables need them. A store may come from others, so nothing in it is taken on trust."""

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from unbackdoor._bench import Store, identity
from unbackdoor._errors import SENTENCE, printable


@dataclass(frozen=True, slots=True)
class Share:
    """A share in [0, 1] of n examples, with its 95 % Wilson interval if it is in the file."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One cell.

    Args:
        key: key of the cell. task, attack, method, clean: identity of the measurement, as canonical JSON; `attack` has
        the model, the factory and the trigger of an existing one, `method` the proxy.
        victim: the key of the victim.
        control: whether the victim is the clean control.
        implanted: None if it is not known, and for a clean control.
        usable: False if the method cost the model its use; None if it is not known.
        success, recovered: None without triggered examples.
        flips: flips of a clean control, by the key of a victim.
        second_accuracy, second_success: on the task's second test examples.
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
    accuracy: Share | None = None
    success: Share | None = None
    recovered: Share | None = None
    label_rule: str | None = None
    flips: dict[str, Share] | None = None
    second_accuracy: Share | None = None
    second_success: Share | None = None
    seconds: float | None = None
    training: float | None = None
    memory: float | None = None
    stress: dict[str, Any] | None = None
    packed: bytes | None = None


def read(store: Store, *, whole: bool) -> Iterator[Record | str]:
    """Yields the records of a store without its audits; for a cell of another form only its key.

    Args:
        store: where they are.
        whole: also keep each cell as it is.
    """
    victims: dict[str, str] = {}
    for spec, result in store.cells():
        try:
            if spec["method"]["name"] == "audit":  # purifies nothing, so it is in none of the tables
                continue
            yield _record(spec, result, victims, whole)
        except (LookupError, TypeError, ValueError, AttributeError):
            yield _key(spec)


def unpacked(record: Record) -> str:
    """The whole cell, as compact JSON."""
    assert record.packed is not None
    return zlib.decompress(record.packed).decode()


def canonical(value: Any) -> str:
    """JSON that is equal for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _key(spec: Any) -> str:
    try:
        return identity(spec)
    except (TypeError, ValueError):
        return "a cell without a spec"


def _record(spec: dict[str, Any], result: dict[str, Any], victims: dict[str, str], whole: bool) -> Record:
    victim = spec["victim"]
    text = canonical(victim)
    if text not in victims:
        victims[text] = identity(victim)
    attack = {**victim["attack"], **{name: victim[name] for name in ("model", "factory", "trigger") if name in victim}}
    method = {**spec["method"], **({"proxy": spec["proxy"]} if "proxy" in spec else {})}
    for named in (victim["task"], attack, method):
        if not isinstance(named["name"], str):
            raise TypeError
    if spec["clean"] is not None:
        int(spec["clean"]["n"])
    rate = victim["rate"]
    control = attack["name"] == "none"
    common: dict[str, Any] = {
        "key": identity(spec),
        "task": canonical(victim["task"]),
        "attack": canonical(attack),
        "method": canonical(method),
        "clean": canonical(spec["clean"]),
        "rate": None if rate is None else number(rate),
        "victim": victims[text],
        "victim_seed": None if victim["seed"] is None else int(victim["seed"]),
        "seed": int(spec["seed"]),
        "control": control,
        "provenance": canonical(result.get("provenance") or {}),
        "packed": zlib.compress(canonical({"spec": spec, "result": result}).encode(), 1) if whole else None,
    }
    if result["status"] == "failed":
        return Record(**common, message=printable(result["message"], SENTENCE))
    score = result["score"]
    flips = result.get("flips")
    second = result.get("second_test") or {}
    return Record(
        **common,
        message=None,
        implanted=None if result["implanted"] is None else bool(result["implanted"]),
        usable=None if result.get("usable") is None else bool(result["usable"]),
        accuracy=_share(score["clean_accuracy"]),
        success=_share(score["attack_success"]) if "attack_success" in score else None,
        recovered=_share(score["recovered_accuracy"]) if "recovered_accuracy" in score else None,
        label_rule=printable(score["label_rule"]) if "label_rule" in score else None,
        flips=None if flips is None else {str(name): _share(share) for name, share in flips.items()},
        second_accuracy=_share(second["clean_accuracy"]) if second else None,
        second_success=_share(second["attack_success"]) if "attack_success" in second else None,
        seconds=number(result["seconds"]),
        training=None if result["training_seconds"] is None else number(result["training_seconds"]),
        memory=None if result["peak_memory_bytes"] is None else number(result["peak_memory_bytes"]),
        stress=result["stress"] if isinstance(result.get("stress"), dict) else None,
    )


def _share(given: dict[str, Any]) -> Share:
    value, n = number(given["value"]), given["n"]
    if not 0 <= value <= 1 or not isinstance(n, int) or n < 1:
        raise ValueError
    if "low" not in given or "high" not in given:
        return Share(value, n)
    return Share(value, n, number(given["low"]), number(given["high"]))


def number(given: Any) -> float:
    """A finite number, or a ValueError."""
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        raise ValueError
    return float(given)
