"""Writes the stubs of `purifiers` and `attacks` from the tables of facts: python tests/registry/stubs.py."""

from collections.abc import Iterator
from pathlib import Path

from unbackdoor._registry import attacks, purifiers

SOURCE = Path(__file__).parents[2] / "src/unbackdoor"
TABLES = {"purifiers": purifiers.REGISTRY, "attacks": attacks.REGISTRY}
COMBINERS = {"purifiers": ("unbackdoor.purifiers.then:Then",), "attacks": ()}  # have no name on the command line


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


if __name__ == "__main__":
    for path, text in stubs():
        path.write_text(text, encoding="utf-8")
