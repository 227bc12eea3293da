"""Checks that ruff does not make: docstrings in private packages, the length of functions, one class per name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/unbackdoor"
MODULES = sorted(SOURCE.rglob("*.py"))
LONGEST = 80  # lines of a function


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def definitions(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, ast.AST]]:
    """All classes and functions that are public by name and not within a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not node.name.startswith("_") and not inside:
                yield node.name, node
                if isinstance(node, ast.ClassDef):
                    yield from ((f"{node.name}.{name}", each) for name, each in definitions(node))
        else:
            yield from definitions(node, inside)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_what_is_public_in_them_have_docstrings(path: Path) -> None:
    """Ruff takes all that lies in a package with an underscore for private."""
    tree = ast.parse(path.read_text())
    bare = [name for name, node in definitions(tree) if not ast.get_docstring(node)]
    assert ast.get_docstring(tree), "the module"
    assert not bare


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_function_is_long(path: Path) -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, functions)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in nodes}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_each_class_has_a_name_of_its_own() -> None:
    """One name has one meaning, whatever the module is."""
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name_of(path))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
