"""The published tables say what their cells say, and each grid is one that this version reads."""

import importlib
from pathlib import Path

import pytest

from unbackdoor._reports.store.run import write_report

ROOT = Path(__file__).parents[2]
ZOO = ROOT / "docs/results/cells/zoo"
GUARDS = ROOT / "docs/results/measured/guards"
AUDITED = (ZOO, ZOO.with_name("zoo-texts"))  # stores of audits alone, of which `report` makes no table
STORES = sorted(path for path in ZOO.parent.iterdir() if path.is_dir() and path not in AUDITED)


@pytest.mark.parametrize("store", STORES, ids=lambda path: path.name)
def test_a_published_table_is_what_its_cells_give(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = ROOT / "docs/results/tables" / f"{store.name}.md"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        "unbackdoor._reports.store.run.write_file", lambda path, text: (tmp_path / path.name).write_text(text)
    )
    write_report(str(store.relative_to(ROOT)), str(published.relative_to(ROOT)))
    assert published.read_text() == (tmp_path / published.name).read_text(), "run make results"


@pytest.mark.thorough
def test_the_statistics_of_audits_are_what_the_cells_of_the_zoo_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    results = importlib.import_module("zoo_results").results()
    pages = {"audit.md", "roc.svg", "audit-texts.md", "roc-texts.svg"}
    assert {path.name for path in results} == {"nulls.json", "operating_point.json", *pages}
    for path, text in results.items():
        assert path.read_text() == text, "run make results"


def test_the_table_of_guards_is_what_its_cells_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    written = importlib.import_module("guard_results").table(GUARDS)
    assert (ROOT / "docs/results/tables/guards-by-script.md").read_text() == written, "run make results"
