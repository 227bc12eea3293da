"""The cell store: one JSON file per measurement, named by what was measured, written in one step."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbackdoor._errors import UnbackdoorError
from unbackdoor._output import write_file

VERSION = 1  # of the identity: part of every key, so that a change of meaning never finds old cells


def identity(spec: dict[str, Any]) -> str:
    """The key of a measurement: a hash of what determines its result, whatever the order of its entries.

    >>> identity({"seed": 0, "rate": 0.01}) == identity({"rate": 0.01, "seed": 0})
    True
    """
    text = json.dumps({"version": VERSION, **spec}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Store:
    """A folder of cells. Two processes may share it, and a process may be killed at any moment.

    Args:
        folder: made when the first cell is written.
    """

    folder: Path

    def path(self, spec: dict[str, Any]) -> Path:
        """Where the cell of a measurement is, or would be."""
        return self.folder / f"{identity(spec)}.json"

    def get(self, spec: dict[str, Any]) -> dict[str, Any] | None:
        """The result of a measurement, or None where it has not been made."""
        path = self.path(spec)
        return _read(path)["result"] if path.exists() else None

    def put(self, spec: dict[str, Any], result: dict[str, Any]) -> None:
        """Keep a result.

        Raises:
            IncompleteError: the disk is full; no half cell is left.
        """
        write_file(self.path(spec), json.dumps({"version": VERSION, "spec": spec, "result": result}, indent=1) + "\n")

    def cells(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """All (spec, result) pairs, in the order of their keys."""
        for path in sorted(self.folder.glob("*.json")):
            cell = _read(path)
            yield cell["spec"], cell["result"]


def _read(path: Path) -> dict[str, Any]:
    try:
        cell: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        cell["spec"], cell["result"]
    except (ValueError, KeyError, TypeError):
        raise UnbackdoorError(f"{path} is no cell that unbackdoor wrote. Remove it to measure it again.") from None
    if cell.get("version") != VERSION:
        raise UnbackdoorError(f"{path} has version {cell.get('version')}, this one reads {VERSION}. Use another store.")
    return cell
