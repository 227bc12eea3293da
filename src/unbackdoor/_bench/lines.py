"""Line numbers of the entries of a TOML file, which tomllib does not report."""

import re
from collections import Counter

_HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")

Location = tuple[str | int, ...]


def lines_of(text: str) -> dict[Location, int]:
    """Returns the line, from 1, of each table and key, by its path: `("methods", 0, "alpha")`.

    Entries of inline tables and of arrays share the line at which they begin.
    """
    lines: dict[Location, int] = {}
    arrays: Counter[Location] = Counter()
    table: Location = ()
    for number, line in enumerate(text.splitlines(), start=1):
        header, key = _HEADER.match(line), _KEY.match(line)
        if header:
            table = _path(header[2])
            if header[1] == "[[":
                arrays[table] += 1
                table = (*table, arrays[table] - 1)
            lines.setdefault(table, number)
        elif key:
            lines.setdefault((*table, *_path(key[1])), number)
    return lines


def line_of(location: Location, lines: dict[Location, int]) -> int | None:
    """Returns the line of an entry, or of the table that contains it."""
    for length in range(len(location), 0, -1):
        if location[:length] in lines:
            return lines[location[:length]]
    return None


def _path(dotted: str) -> Location:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))
