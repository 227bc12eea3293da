"""Short names of attacks, methods, tasks and budgets. Two different ones never get the same name."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from unbackdoor._errors import printable


def of_values(texts: Iterable[str], labels: dict[str, set[str]] | None = None) -> dict[str, str]:
    """Returns names of attacks or methods in canonical JSON: settings other than the defaults are in brackets.

    Args:
        texts: the values.
        labels: labels in the grids; a label that all grids agree on is the name.

    >>> of_values(['{"name":"fst","parameters":{"alpha":0.2},"version":1}']).popitem()[1]
    'fst (alpha=0.2)'
    """
    called = {text: next(iter(of_value)) for text, of_value in (labels or {}).items() if len(of_value) == 1}
    return _distinct({text: called.get(text) or _value_name(json.loads(text)) for text in texts})


def of_tasks(texts: Iterable[str]) -> dict[str, str]:
    """Returns names of tasks; if two have the same name, their data follow in brackets."""
    specs = {text: json.loads(text) for text in texts}
    often = Counter(spec["name"] for spec in specs.values())
    named = {}
    for text, spec in specs.items():
        hashes = ("name", "train", "test", "base", "columns")
        details = {key: entry for key, entry in spec.items() if key not in hashes}
        named[text] = spec["name"] + (_bracketed(details) if often[spec["name"]] > 1 else "")
    return _distinct(named)


def of_budgets(texts: Iterable[str]) -> dict[str, str]:
    """Names of clean budgets.

    >>> of_budgets(['{"from":"unseen","n":1000,"seed":0}']).popitem()[1]
    '1,000 unseen'
    """
    named = {}
    for text in texts:
        spec = json.loads(text)
        if spec is None:
            named[text] = "none"
        else:
            draw = f", draw {spec['seed']}" if spec.get("seed") else ""
            named[text] = f"{int(spec['n']):,} {spec.get('from', '')}{draw}"
    return _distinct(named)


def _value_name(spec: dict[str, Any]) -> str:
    parameters, version = spec.get("parameters") or {}, spec.get("version", 1)
    if isinstance(parameters, list):  # of a composition, one entry a step
        steps = spec["name"].split("+")
        prefixes = steps if len(steps) == len(parameters) else [str(place) for place in range(len(parameters))]
        parameters = {
            f"{prefix}.{name}": entry
            for prefix, part in zip(prefixes, parameters, strict=True)
            for name, entry in dict(part).items()
        }
    newer = version if isinstance(version, list) else [version]
    details = dict(parameters)
    if spec.get("behaviour") is not None:
        details["behaviour"] = spec["behaviour"]
    if any(each != 1 for each in newer):
        details["version"] = version
    return str(spec["name"]) + _bracketed(details)


def _bracketed(details: dict[str, Any]) -> str:
    return (
        f" ({', '.join(f'{name}={_entry_text(entry)}' for name, entry in sorted(details.items()))})" if details else ""
    )


def _entry_text(entry: Any) -> str:
    if isinstance(entry, str) and entry.startswith("sha256:"):
        return entry[7:13]
    return entry if isinstance(entry, str) else json.dumps(entry)


def _distinct(named: dict[str, str]) -> dict[str, str]:
    named = {text: printable(" ".join(name.split()), 300) for text, name in named.items()}
    often = Counter(named.values())
    return {
        text: f"{name} #{hashlib.sha256(text.encode()).hexdigest()[:6]}" if often[name] > 1 else name
        for text, name in named.items()
    }
