"""Writes the stubs and the API pages of what has a table of facts: purifiers, attacks, detectors, guards, trainers.

python tests/registry/stubs.py
"""

from collections.abc import Iterator
from pathlib import Path

from unbackdoor._registry import attacks, detectors, guards, purifiers, trainers

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/unbackdoor"
TABLES = {
    "purifiers": purifiers.REGISTRY,
    "attacks": attacks.REGISTRY,
    "detectors": detectors.REGISTRY,
    "guards": guards.REGISTRY,
    "trainers": trainers.REGISTRY,
}
COMBINERS = {
    "purifiers": ("unbackdoor.purifiers.then:Then",),
    "attacks": (),
    "detectors": (),
    "guards": (),
    "trainers": (),
}  # have no name on the command line

# The headings of the API pages, by the kinds of data that are served besides pairs of image and caption.
KINDS: dict[str, set[str]] = {
    "On images, texts and prompts": {"images", "text", "conversations"},
    "On images and texts": {"images", "text"},
    "On images": {"images"},
    "On texts and prompts": {"text", "conversations"},
    "On texts": {"text"},
    "On prompts": {"conversations"},
    "On pairs of image and caption": set(),
}


def stubs() -> Iterator[tuple[Path, str]]:
    """Each stub and what belongs in it."""
    for package, entries in TABLES.items():
        classes = sorted({*(entry.location for entry in entries), *COMBINERS[package]}, key=str.lower)
        lines = [
            f'"""Written by tests/registry/stubs.py from _registry/{package}.py."""',
            "",
            "import unbackdoor._registry.entries",
            "",
        ]
        for location in classes:
            module, _, name = location.removeprefix(f"unbackdoor.{package}.").partition(":")
            lines.append(f"from .{module} import {name} as {name}")
        lines += ["", "REGISTRY: tuple[unbackdoor._registry.entries.Entry, ...]", ""]
        yield SOURCE / package / "__init__.pyi", "\n".join(lines)


def pages() -> Iterator[tuple[Path, str]]:
    """Each API page: the introduction that it has, then the classes by the kinds of data that they serve."""
    for package, entries in TABLES.items():
        page = ROOT / "docs/api" / f"{package}.md"
        introduction, _, _ = page.read_text(encoding="utf-8").partition("## ")
        sections = {
            heading: [entry.location for entry in entries if {*entry.modality} - {"image-text"} == kinds]
            for heading, kinds in KINDS.items()
        }
        sections["One after another"] = list(COMBINERS[package])
        parts = [
            "\n".join(
                [f"## {heading}", "", *(f"::: unbackdoor.{package}.{_class(location)}" for location in locations)]
            )
            for heading, locations in sections.items()
            if locations
        ]
        yield page, introduction + "\n\n".join(parts) + "\n"


def _class(location: str) -> str:
    return location.partition(":")[2]


if __name__ == "__main__":
    for path, text in [*stubs(), *pages()]:
        path.write_text(text, encoding="utf-8")
