"""The published tables say what their cells say, and each grid is one that this version reads."""

from pathlib import Path

import pytest

from unbackdoor._reports.store.run import write_report

ROOT = Path(__file__).parents[2]
STORES = sorted(path for path in (ROOT / "docs/results/cells").iterdir() if path.is_dir())


@pytest.mark.parametrize("store", STORES, ids=lambda path: path.name)
def test_a_published_table_is_what_its_cells_give(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = ROOT / "docs/results/tables" / f"{store.name}.md"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        "unbackdoor._reports.store.run.write_file", lambda path, text: (tmp_path / path.name).write_text(text)
    )
    write_report(str(store.relative_to(ROOT)), str(published.relative_to(ROOT)))
    assert published.read_text() == (tmp_path / published.name).read_text(), "run make results"
