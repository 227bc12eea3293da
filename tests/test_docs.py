"""The docs hang together: pages, links, commands and API entries exist. `make docs` looks at the rest."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import unbackdoor
from unbackdoor._cli.chosen import spelled_out
from unbackdoor._cli.parser import parser
from unbackdoor.attacks import REGISTRY as ATTACKS
from unbackdoor.detectors import REGISTRY as DETECTORS
from unbackdoor.guards import REGISTRY as GUARDS
from unbackdoor.purifiers import REGISTRY as PURIFIERS
from unbackdoor.trainers import REGISTRY as TRAINERS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "victims" not in page.parts)  # of a bench that ran here
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]


def entries(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from entries(part)


def commands() -> Iterator[tuple[str, str]]:
    """The page and the text of each command in an indented block, continued lines joined."""
    for page in TEXTS:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"^ {4,}(?:[A-Z_]+=\S+ )*(unbackdoor .*)$", text, flags=re.MULTILINE):
            if "|" not in line and not line.startswith("unbackdoor COMMAND"):
                yield page.name, line


def test_the_site_has_every_page_and_no_other() -> None:
    nav = list(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(nav) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|^ {4}.*?$|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|#", link):
            target = (page.parent / link.partition("#")[0]).resolve()
            assert target.is_file(), f"{link} does not exist"
            if page in PAGES:
                assert target.is_relative_to(DOCS), f"{link} is not on the site"


def test_parts_of_the_readme_that_the_site_includes_have_no_relative_links() -> None:
    """They would lead elsewhere from another folder."""
    parts = re.findall(r"start:\S+\] -->(.*?)<!-- --8<-- \[end", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(parts) == 2
    assert [link for part in parts for link in re.findall(r"\]\((?!https?:)([^)]+)\)", part)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lists_are_lists_on_the_site_too(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for block in re.split(r"\n\s*\n", text):
        items = [bool(re.match(r"(- |\d+\. )", line)) for line in block.split("\n")]
        assert items[0] or not any(items), f"a list needs a blank line before it: {block[:80]}"
        assert not re.match(r" {1,3}\S", block), f"four spaces make a part of a list item: {block[:80]}"


@pytest.mark.parametrize("page", [*TEXTS, ROOT / "CHANGELOG.md"], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_of_prose_end_before_column_120(page: Path) -> None:
    text = "" if page.parent.name == "tables" else page.read_text()  # these are written by `make results`
    assert [line for line in text.split("\n") if len(line) >= 120 and not line.startswith("|")] == []


def test_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    shown = list(commands())
    assert len(shown) > 30
    for page, line in shown:
        given = spelled_out(shlex.split(line, comments=True)[1:])
        try:
            parser(given, line).parse_args(given, exit_on_error=False, print_error=False)
        except Exception as problem:
            raise AssertionError(f"{page}: {line}") from problem


def test_the_api_pages_name_everything_public() -> None:
    shown = re.findall(
        r"^::: (\S+)$", "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md")), re.MULTILINE
    )
    classes = [
        f"{kind}.{entry.location.partition(':')[2]}"
        for kind, all_ in (
            ("purifiers", PURIFIERS),
            ("attacks", ATTACKS),
            ("detectors", DETECTORS),
            ("guards", GUARDS),
            ("trainers", TRAINERS),
        )
        for entry in all_
    ]
    packages = ("archs", "attacks", "detectors", "guards", "purifiers", "testing", "trainers")
    names = [name for name in dir(unbackdoor) if name not in packages]
    assert {f"unbackdoor.{name}" for name in [*names, *classes]} <= set(shown)
    assert len(shown) == len(set(shown))
