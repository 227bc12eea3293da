"""The public names: the stubs agree with the tables of facts, and `dir` shows what can be imported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from stubs import SOURCE, pages, stubs

import unbackdoor
from unbackdoor import attacks, guards, purifiers, trainers


@pytest.mark.parametrize(
    ("path", "text"),
    [*stubs(), *pages()],
    ids=lambda part: "/".join(part.parts[-2:]) if isinstance(part, Path) else "",
)
def test_a_stub_and_an_api_page_are_what_the_table_makes_of_them(path: Path, text: str) -> None:
    assert path.read_text() == text, "run: python tests/registry/stubs.py"


@pytest.mark.parametrize(
    "module", [unbackdoor, purifiers, attacks, guards, trainers], ids=lambda module: module.__name__
)
def test_dir_shows_the_public_names_and_no_other(module) -> None:
    assert dir(module) == sorted(module.__all__)
    for name in dir(module):
        assert not name.startswith("_")
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        getattr(module, "nothing")  # noqa: B009


def test_classes_are_public_where_they_are_imported_from() -> None:
    assert {"FST", "Then", "FineMixing"} < set(dir(purifiers))
    assert {"BadNets", "Word", "Prepared"} < set(dir(attacks))
    assert {"purify", "load", "UnbackdoorError", "purifiers", "testing"} < set(dir(unbackdoor))
    assert purifiers.FST is sys.modules["unbackdoor.purifiers.fst"].FST


def test_the_stub_of_the_package_names_only_itself_and_what_is_in_it() -> None:
    tree = ast.parse((SOURCE / "__init__.pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(tree.body) - 1
    assert all(node.level == 1 for node in imports)


def test_a_traceback_shows_the_public_name_of_the_error() -> None:
    script = "import unbackdoor; raise unbackdoor.UnbackdoorError('No.')"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stderr
    assert shown.endswith("unbackdoor.UnbackdoorError: No.\n")
