"""Importing the package, its help and its lists load no heavy library."""

import json
import subprocess
import sys

import pytest

HEAVY = """
import sys
def heavy():
    return sorted({"torch", "transformers", "datasets", "matplotlib"} & set(sys.modules))
"""

COMMANDS = """
import contextlib, io, json
from unbackdoor._cli.app import main

def shown(arguments):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            main(arguments)
        except SystemExit as ended:
            assert ended.code == 0, ended.code
    return printed.getvalue(), heavy(), "rich.markdown" in sys.modules

print(json.dumps([shown(arguments) for arguments in json.loads(sys.argv[1])]))
"""

SHOWN = [
    (["--help"], "purify"),  # first, since it must not load what the next ones may
    (["list"], "unbackdoor list attacks"),
    (["list", "methods"], "fst"),
    (["list", "attacks"], "badnets"),
    (["list", "archs"], "resnet18"),
    (["list", "detectors"], "cannot see"),
    (["list", "guards"], "strip"),
    (["list", "trainers"], "abl"),
    (["audit", "--help"], "--fail-on-finding"),
    (["guard", "fit", "--help"], "strip"),
    (["purify", "fst", "--help"], "weight of the inner product"),
    (["purify", "pam+fst", "--help"], "--fst.epochs INT           passes over"),
    (["purify", "fst", "model", "--out", "-h"], "--batch-size"),
    (["attack", "badnets", "--help"], "pixels between the patch"),
    (["guard", "fit", "strip", "-h"], "of the words that are exchanged"),
    (["train", "abl", "--help"], "the loss below which a batch"),
]

Shown = dict[tuple[str, ...], tuple[str, list[str], bool]]


def run(statement: str, *arguments: str) -> str:
    """The output of a fresh interpreter while it runs a statement."""
    command = [sys.executable, "-c", HEAVY + statement, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def shown() -> Shown:
    """By command what it prints, the heavy libraries that are loaded after it, and whether a reader of markup is."""
    commands = [arguments for arguments, _ in SHOWN]
    printed = json.loads(run(COMMANDS, json.dumps(commands)))
    return dict(zip(map(tuple, commands), printed, strict=True))


def test_importing_the_package_loads_no_heavy_library() -> None:
    assert run("import unbackdoor; print(heavy())") == "[]\n"


@pytest.mark.parametrize(("arguments", "expected"), SHOWN)
def test_help_and_lists_load_no_heavy_library(arguments: list[str], expected: str, shown: Shown) -> None:
    printed, loaded, _ = shown[tuple(arguments)]
    assert expected in printed
    assert loaded == []


def test_the_overview_loads_no_reader_of_markup(shown: Shown) -> None:
    assert not shown["--help",][2]
    assert shown["audit", "--help"][2]


def test_the_check_sees_a_heavy_library() -> None:
    assert "torch" in run("from unbackdoor import purifiers; purifiers.FST; print(heavy())")
