"""Messages name parameters, as Python users write them; the command line alone names options."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from unbackdoor._cli.app import main

SOURCE = Path(__file__).parents[1] / "src/unbackdoor"
OTHER_PROGRAMS = {
    *("--always", "--dirty", "--exclude"),  # git's
    "hf download {} --repo-type dataset --local-dir FOLDER",
}


def texts(tree: ast.Module) -> Iterator[str]:
    """All strings of a module but its docstrings; of f-strings what is fixed in them."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    inside = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, owners) and ast.get_docstring(node) and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside |= {part for part in node.values if isinstance(part, ast.Constant)}
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.value


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


@pytest.mark.parametrize(
    "path", [path for path in sorted(SOURCE.rglob("*.py")) if "_cli" not in path.parts], ids=name_of
)
def test_no_message_outside_of_the_command_line_names_an_option(path: Path) -> None:
    named = [
        text
        for text in texts(ast.parse(path.read_text()))
        if re.search(r"(?<![\w-])--[a-z][a-z-]+", text)
        and not text.startswith("unbackdoor ")
        and not re.search(r"(unbackdoor|ray) \w+ ", text)
        and text not in OTHER_PROGRAMS
    ]
    assert not named


def test_the_command_line_shows_parameters_as_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "grid.toml", "--out", "runs", "--workers", "2", "--ray", "auto"])
    assert (stopped.value.code, capsys.readouterr().err) == (
        2,
        "bench takes --workers or --ray, got both. Leave one out.\n",
    )
