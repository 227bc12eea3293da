"""What the tests of grids share."""

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files that the grids name; only their paths and contents count."""
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text(name)
    return tmp_path
