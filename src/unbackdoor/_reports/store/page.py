"""The numbers as one HTML page, which works offline. Records are packed, and unpacked when somebody opens one."""

import base64
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

from unbackdoor._bench import Store
from unbackdoor._reports.store.further import further_tables
from unbackdoor._reports.store.numbers import MEASURES, Report, Row, Spread
from unbackdoor._reports.store.records import Record, unpacked

PACK = 250  # records that are unpacked together
_SPREADS = frozenset(MEASURES)


def render(report: Report, records: list[Record], store: Store) -> str:
    """The page.

    Args:
        report: its numbers.
        records: whole, in the order of the report's cells.
        store: where the grids are.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__).parent
    style = (here.parent / "style.css").read_text(encoding="utf-8")
    style += (here / "page.css").read_text(encoding="utf-8")
    script = (here / "page.js").read_text(encoding="utf-8")
    environment = Environment(loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("page.html.j2").render(
        report=report,
        tables=further_tables(report),
        style=Markup(style),
        style_hash=_hash(style),
        script=Markup(script),
        script_hash=_hash(script),
        numbers=Markup(_embedded(_page_data(report, store))),
        packs=_packs(records),
        pack=PACK,
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(value: Any) -> str:
    """Returns JSON that cannot end the HTML element around it, whatever its strings hold."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII alone
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _packs(records: list[Record]) -> list[str]:
    packs = []
    for start in range(0, len(records), PACK):
        text = "[" + ",".join(unpacked(record) for record in records[start : start + PACK]) + "]"
        packs.append(base64.b64encode(zlib.compress(text.encode(), 9)).decode())
    return packs


class _Words(dict[str, int]):
    """Each string once."""

    def __missing__(self, word: str) -> int:
        self[word] = len(self)
        return self[word]


def _page_data(report: Report, store: Store) -> dict[str, Any]:
    """Returns the data that the script draws; repeated strings are numbers of `words`."""
    words = _Words()
    fields = [name for name in Row.__dataclass_fields__ if name not in ("seeds", "victim_seeds")]
    rows = []
    for row in report.rows:
        line: list[Any] = []
        for name in fields:
            value = getattr(row, name)
            line.append(_spread(value) if name in _SPREADS else words[value] if isinstance(value, str) else value)
        rows.append([*line, words[row.column], int(row.apart)])
    states = ("done", "left out", "failed")
    cells = [
        [line.key, line.row, line.victim_seed, line.seed, states.index(line.status), words[line.grid]]
        for line in report.cells
    ]
    grids = sorted({line.grid for line in report.cells})
    return {
        "store": report.store,
        "fields": [*fields, "column", "apart"],
        "spreads": sorted(_SPREADS),
        "text": ["task", "attack", "budget", "method", "baseline", "label_rule", "column"],
        "rows": rows,
        # The page computes the worst and the mean over the attacks that it shows.
        "blocks": [{name: value for name, value in vars(block).items() if name != "over"} for block in report.blocks],
        "cells": cells,
        "states": states,
        "failures": {failure.key: failure.message for failure in report.failures},
        "grids": {name: _grid(store, name) for name in grids},
        "words": list(words),
    }


def _spread(spread: Spread | None) -> list[float | int | None] | None:
    if spread is None:
        return None
    values = (spread.mean, spread.sd, spread.n, spread.least, spread.most, *(spread.interval or ()))
    return [float(f"{value:.6g}") if isinstance(value, float) else value for value in values]


def _grid(store: Store, name: str) -> str | None:
    """The text of a grid that was run; a name from a record opens nothing but files under `grids/`."""
    if name.startswith(".") or not name.endswith(".toml") or any(letter in name for letter in "/\\:\0"):
        return None
    content = store.place.read(f"grids/{name}")
    return None if content is None else content.decode("utf-8", errors="replace")
