"""The cell store: one JSON file per measurement, named by a hash of what was measured, written in one step."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from unbackdoor._artifacts.cell import Cell, Rows, VictimFiles
from unbackdoor._bench.places import place
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import parsed, read_json

VERSION = 1  # of the identity: part of every key, so that a change of meaning never finds old cells


def identity(spec: dict[str, Any]) -> str:
    """Returns the key of a measurement: a hash of what determines its result, whatever the order of its entries.

    >>> identity({"seed": 0, "rate": 0.01}) == identity({"rate": 0.01, "seed": 0})
    True
    """
    text = json.dumps({"version": VERSION, **spec}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class StoredCell:
    """A cell as it was read.

    Args:
        spec: the description of what was measured, exactly as it was written, because the key is its hash.
        result: the result as it was written.
        content: both, through their schema.
    """

    spec: dict[str, Any]
    result: dict[str, Any]
    content: Cell


class Store:
    """Cells, victims and frozen draws. Processes may share it, and may be killed at any moment.

    Args:
        address: a folder, made when something is first written, or any fsspec address.

    Raises:
        UnbackdoorError: a newer version wrote it, or the address cannot be opened.
    """

    def __init__(self, address: str | Path) -> None:
        self.address = str(address)
        self.place = place(address)
        written = self.place.read("store.json")
        self.marked = written is not None
        if written is not None:
            self._json(written, "store.json")

    def get(self, spec: dict[str, Any]) -> dict[str, Any] | None:
        """The result of a finished measurement, or None if there is none.

        Raises:
            UnbackdoorError: its file is not a cell of this version.
        """
        name = f"cells/{identity(spec)}.json"
        content = self.place.read(name)
        if content is None:
            return None
        cell = self._cell(content, name)
        if cell is None:
            raise self._foreign(name)
        return cell.result

    def put(self, spec: dict[str, Any], result: dict[str, Any]) -> None:
        """Keep a result; one whose `status` is `failed` is kept apart until the measurement succeeds.

        Raises:
            ValidationError: spec or result are not those of a cell.
            IncompleteError: the disk is full; no half cell is left.
        """
        key = identity(spec)
        text = json.dumps({"version": VERSION, "spec": spec, "result": result}, indent=1) + "\n"
        Cell.model_validate_json(text, strict=True)
        self.start()
        if result.get("status") == "failed":
            self.place.write(f"failed/{key}.json", text)
        else:
            self.place.write(f"cells/{key}.json", text)
            self.place.remove(f"failed/{key}.json")

    def start(self) -> None:
        """Mark the store with its version, once."""
        if not self.marked:
            self.place.write("store.json", json.dumps({"version": VERSION}) + "\n")
            self.marked = True

    def done(self) -> set[str]:
        """The keys of finished cells."""
        return self.place.names("cells")

    def failed(self) -> set[str]:
        """The keys of cells that failed."""
        return self.place.names("failed") - self.done()

    def cells(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yields the (spec, result) pairs of all cells of the schema's form; see `read_cells`."""
        for cell in self.read_cells():
            if isinstance(cell, StoredCell):
                yield cell.spec, cell.result

    def read_cells(self) -> Iterator[StoredCell | str]:
        """Yields all cells in the order of their keys, the failed ones last; of one of another form only its key."""
        names = [f"cells/{key}.json" for key in sorted(self.done())]
        names += [f"failed/{key}.json" for key in sorted(self.failed())]
        for name, content in zip(names, self.place.read_all(names), strict=True):
            if content is not None:  # or another process has removed it meanwhile
                cell = self._cell(content, name)
                yield Path(name).stem if cell is None else cell

    def rows(self, spec: dict[str, Any], draw: Callable[[], list[int]]) -> list[int]:
        """Returns row numbers that are drawn once and then kept, so that another version gets the same ones."""
        name = f"rows/{identity(spec)}.json"
        content = self.place.read(name)
        if content is None:
            drawn = {"version": VERSION, "spec": spec, "rows": draw()}
            Rows.model_validate(drawn)
            self.place.write(name, json.dumps(drawn) + "\n")
            content = self.place.read(name)
            assert content is not None
        try:
            return Rows.model_validate(self._json(content, name)).rows
        except ValidationError:
            raise self._foreign(name) from None

    def victims(self) -> set[str]:
        """The keys of trained victims."""
        return self.place.names("victims")

    def put_victim(self, spec: dict[str, Any], fill: Callable[[Path], None]) -> None:
        """Keep a victim, with the hash of each of its files.

        Raises:
            IncompleteError: the disk is full; no part of the victim is left.
        """

        def fill_and_sign(folder: Path) -> None:
            fill(folder)
            manifest = {"version": VERSION, "spec": spec, "files": digests(folder)}
            VictimFiles.model_validate(manifest)
            (folder / "files.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

        self.start()
        self.place.put_folder(f"victims/{identity(spec)}", fill_and_sign)

    def victim(self, key: str) -> Path:
        """A victim's folder, on this machine.

        Raises:
            UnbackdoorError: the victim is missing, or one of its files was changed.
        """
        name = f"victims/{key}"
        folder = self.place.get_folder(name)
        if folder is None:
            raise UnbackdoorError(f"{self.place.path(name)} is not there. Start the grid again to train it again.")
        try:
            files = VictimFiles.model_validate(read_json(folder / "files.json")).files
        except (UnbackdoorError, ValidationError):
            raise UnbackdoorError(
                f"{folder} is not a victim that unbackdoor bench wrote. Remove it to train it again."
            ) from None
        present = digests(folder)
        odd = sorted(name for name in files.keys() | present.keys() if files.get(name) != present.get(name))
        if odd:
            raise UnbackdoorError(
                f"{folder / odd[0]} was changed, added or removed after this victim was trained. Put it back, or "
                f"remove {folder} to train the victim again."
            )
        return folder

    def locked(self, key: str, *, wait: bool = False) -> AbstractContextManager[bool]:
        """Lock a key against other processes; yields whether the lock was obtained."""
        return self.place.locked(key, wait=wait)

    def _cell(self, content: bytes, name: str) -> StoredCell | None:
        """Returns a cell through its schema; None if it has another form."""
        written = self._json(content, name)
        try:
            cell = Cell.model_validate(written, strict=True)
        except ValidationError:
            return None
        key = identity(written["spec"])
        if key != Path(name).stem:  # it would count as one more repetition
            raise UnbackdoorError(
                f"{self.place.path(name)} holds the cell {key}, whose file has that name, so it is a copy, or was "
                "changed. Remove it, or put the original back."
            )
        return StoredCell(written["spec"], written["result"], cell)

    def _json(self, content: bytes, name: str) -> dict[str, Any]:
        try:
            entries = parsed(content.decode(), self.place.path(name))
            version = entries.get("version")
        except (UnbackdoorError, UnicodeDecodeError):
            raise self._foreign(name) from None
        if version != VERSION:
            raise UnbackdoorError(
                f"{self.place.path(name)} has version {printable(version)}, this one reads {VERSION}. Use another "
                "store, or update unbackdoor."
            )
        return entries

    def _foreign(self, name: str) -> UnbackdoorError:
        path = self.place.path(name)
        return UnbackdoorError(f"{path} is not a file that unbackdoor bench wrote. Remove it to measure it again.")


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file under a folder, by relative name; `files.json` itself is left out."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "files.json":
            with path.open("rb") as file:
                hashes[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
