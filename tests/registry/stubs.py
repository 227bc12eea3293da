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
            "On images, texts and prompts": [
                entry.location for entry in entries if {*entry.modality} == {"images", "text", "conversations"}
            ],
            "On images and texts": [entry.location for entry in entries if {*entry.modality} == {"images", "text"}],
            "On images": [entry.location for entry in entries if entry.modality == ("images",)],
            "On texts and prompts": [
                entry.location for entry in entries if entry.modality == ("text", "conversations")
            ],
            "On texts": [entry.location for entry in entries if entry.modality == ("text",)],
            "On prompts": [entry.location for entry in entries if entry.modality == ("conversations",)],
            "One after another": COMBINERS[package],
        }
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
