"""The written formats: old files read through today's schemas, and the schemas in the docs are today's."""

import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from unbackdoor import UnbackdoorError
from unbackdoor._artifacts.attack_record import AttackRecord, recorded_implanted
from unbackdoor._artifacts.cell import Cell, Mark, Rows
from unbackdoor._artifacts.record import check_record, read_record, recorded_seconds, write_record
from unbackdoor._artifacts.schemas import SCHEMAS, schema

ROOT = Path(__file__).parents[2]
VICTIM = ROOT / "tests" / "victim"
CELLS = ROOT / "docs" / "results" / "cells"


def unchanged(read: BaseModel) -> dict:
    return read.model_dump(mode="json", exclude_unset=True)


def test_the_record_of_an_old_victim_is_read() -> None:
    content = json.loads((VICTIM / "record.json").read_text())
    record = read_record(VICTIM / "record.json")
    assert unchanged(record) == content
    assert record.attack.name == "blended"
    content = json.loads((VICTIM / "attack.json").read_text())
    assert unchanged(AttackRecord.model_validate(content)) == content


def test_all_published_cells_are_read() -> None:
    paths = sorted(CELLS.rglob("*.json"))
    kinds: dict[str, type[BaseModel]] = {"cells": Cell, "failed": Cell, "rows": Rows}
    for path in paths:
        content = json.loads(path.read_text())
        kind = Mark if path.name == "store.json" else kinds.get(path.parent.name)
        read = check_record(content) if kind is None else kind.model_validate(content)
        assert unchanged(read) == content, path
    assert len(paths) > 700


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schemas_in_the_docs_are_those_of_the_code(name: str) -> None:
    written = (ROOT / "docs" / "schemas" / f"{name}.schema.json").read_text()
    assert json.loads(written) == json.loads(schema(name)), "run: python -m unbackdoor._artifacts.schemas docs/schemas"


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [
        ("record-of-purify", "`purify` writes:", "`attack` writes:"),
        ("record-of-attack", "`attack` writes:", "`train` writes:"),
        ("record-of-train", "`train` writes:", "`demo` writes"),
        ("record-of-demo", "`demo` writes", "\n## audit.json"),
        ("audit", "\n## audit.json", "\n## guard.json"),
        ("guard", "\n## guard.json", "\n## attack.json"),
        ("attack", "\n## attack.json", "\n## stress.json"),
        ("stress", "\n## stress.json", "The tests, as far as"),
    ],
)
def test_the_docs_name_each_key(name: str, begin: str, end: str) -> None:
    tables = (ROOT / "docs" / "architecture.md").read_text().partition(begin)[2].partition(end)[0]
    assert [key for key in SCHEMAS[name].model_fields if f"`{key}`" not in tables] == []


@pytest.mark.parametrize(
    ("change", "entry"),
    [({"seeed": 1}, "seeed"), ({"seed": "one"}, "seed"), ({"scores": {}}, "scores.victim"), ({"rate": 2}, "rate")],
)
def test_what_does_not_fit_the_schema_is_neither_read_nor_written(change: dict, entry: str, tmp_path: Path) -> None:
    content = {**json.loads((VICTIM / "record.json").read_text()), **change}
    path = tmp_path / "record.json"
    with pytest.raises(ValidationError, match=entry):
        write_record(path, content)
    assert not path.exists()
    path.write_text(json.dumps(content))
    with pytest.raises(UnbackdoorError) as refusal:
        read_record(path)
    assert str(refusal.value).startswith(f"{path} is not a record that unbackdoor wrote (VictimRecord.{entry}")
    assert str(refusal.value).endswith("). Write it again, or take the version of unbackdoor that wrote it.")


def test_the_seconds_and_the_success_of_a_victim_are_read_from_its_files(tmp_path: Path) -> None:
    record = json.loads((VICTIM / "record.json").read_text())
    assert recorded_seconds(VICTIM) == record["seconds"]
    assert recorded_implanted(VICTIM / "attack.json") is True
    assert recorded_seconds(tmp_path) is None
    assert recorded_implanted(tmp_path / "attack.json") is None
    (tmp_path / "record.json").write_text('{"seconds": 3}')  # of another program
    assert recorded_seconds(tmp_path) is None
    (tmp_path / "attack.json").write_text('{"implanted": true}')
    with pytest.raises(UnbackdoorError) as refusal:
        recorded_implanted(tmp_path / "attack.json")
    assert str(refusal.value) == (
        f"{tmp_path / 'attack.json'} is not an attack.json that unbackdoor attack wrote. Plant the attack again."
    )
