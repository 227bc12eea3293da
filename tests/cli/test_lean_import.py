"""Importing the package, its help and its lists load no heavy library."""

import subprocess
import sys

import pytest

CLOSING = """
import sys
print(sorted({"torch", "transformers", "datasets", "matplotlib"} & set(sys.modules)))
"""

COMMAND = """
from unbackdoor._cli.app import main
try:
    main({arguments!r})
except SystemExit as ended:
    assert ended.code == 0, ended.code
"""


def run(statement: str) -> tuple[str, str]:
    """What a fresh interpreter prints while it runs a statement, and the heavy libraries that it then holds."""
    command = [sys.executable, "-c", statement + CLOSING]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    printed, _, loaded = child.stdout.strip().rpartition("\n")
    return printed, loaded


def test_importing_the_package_loads_no_heavy_library() -> None:
    assert run("import unbackdoor") == ("", "[]")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "purify"),
        (["list"], "unbackdoor list attacks"),
        (["list", "methods"], "fst"),
        (["list", "attacks"], "badnets"),
        (["list", "archs"], "resnet18"),
        (["list", "detectors"], "cannot see"),
        (["list", "guards"], "strip"),
        (["guard", "fit", "--help"], "strip"),
        (["list", "trainers"], "abl"),
        (["audit", "--help"], "--fail-on-finding"),
    ],
)
def test_help_and_lists_load_no_heavy_library(arguments: list[str], expected: str) -> None:
    printed, loaded = run(COMMAND.format(arguments=arguments))
    assert expected in printed
    assert loaded == "[]"


def test_the_overview_loads_no_reader_of_markup() -> None:
    printed, _ = run("import sys\n" + COMMAND.format(arguments=["--help"]) + "print('rich.markdown' in sys.modules)")
    assert printed.endswith("\nFalse")


def test_the_check_sees_a_heavy_library() -> None:
    assert "torch" in run("from unbackdoor import purifiers; purifiers.FST")[1]
