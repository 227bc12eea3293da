"""The truth about a poisoned set, if it carries it: the column that `attack` writes next to poisoned examples."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from unbackdoor._data.columns import check_column, joined
from unbackdoor._data.reading import opened
from unbackdoor._data.writing import POISONED
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inputs import reader


@reader("source")
def poisoned_rows(source: str | Path | Sequence[str | Path], label: str = "label") -> Tensor | None:
    """Returns the rows that a data set says are poisoned, (k,), from 0; None if it has no column `poisoned`.

    Args:
        source: a source for `Dataset.load`.
        label: its column of labels.

    Raises:
        UnbackdoorError: the column holds anything but true and false, or a file lacks it that others have.
    """
    where = str(source) if isinstance(source, str | Path) else ", ".join(map(str, source))
    tables = opened(source, where, label=label, classes=None)
    if not any(POISONED in table.cells for table in tables):
        return None
    check_column(tables, POISONED, POISONED, where)
    cells = joined(tables, POISONED)
    truths = {"true": True, "false": False, "1": True, "0": False}
    known = [truths.get(str(cell).lower()) for cell in cells]
    if None in known:
        row = known.index(None)
        raise UnbackdoorError(
            f"{where} has a column {POISONED!r} that must hold true and false, got {cells[row]!r} in row {row}. "
            "Correct it, or leave the column out."
        )
    return torch.tensor([row for row, poisoned in enumerate(known) if poisoned], dtype=torch.int64)
