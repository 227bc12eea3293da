"""Columns of a data set: which of them hold texts, pictures and labels, and whether all files have them."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from unbackdoor._data.labels import alike
from unbackdoor._data.reading import Table
from unbackdoor._data.texts import TextEncoder
from unbackdoor._errors import UnbackdoorError, printable


def joined(tables: Sequence[Table], column: str) -> list[Any]:
    """The cells of a column of all tables, one table after another."""
    return [cell for table in tables for cell in table.column(column)]


def check_column(tables: Sequence[Table], wanted: str, column: str, where: str) -> None:
    """Refuse a column that a table has not, or has twice."""
    table = next((table for table in tables if column not in table.cells), None)
    if table is None:
        return
    if column in table.twice:
        raise UnbackdoorError(f"{where} has several columns of the name {column!r}. Rename all but one.")
    if column in tables[0].cells:
        raise UnbackdoorError(
            f"{where} has a file without the column {column!r} that the first one has; it has "
            f"{listed(table.cells)}. Give files of one data set."
        )
    option = "--group NAME" if wanted == "group" else f"--columns {wanted}=NAME"
    raise UnbackdoorError(
        f"{where} has no column {column!r}; it has {listed(table.cells)}. Name it by {option}{table.hint}."
    )


def listed(columns: Iterable[str]) -> str:
    """The names of columns, for a message."""
    return printable(", ".join(columns), 300)


def check_label_names(
    tables: Sequence[Table], label: str, labels: Tensor, classes: Sequence[str] | None, where: str
) -> None:
    """Refuse numbers as labels whose names, in a column beside them, are those of other classes of the model."""
    beside = next((name for name in ("label_text", "label_name") if all(name in table.cells for table in tables)), None)
    if beside is None or beside == label or classes is None:
        return
    by_name = {alike(name): number for number, name in enumerate(classes)}
    for row, (number, name) in enumerate(zip(labels.tolist(), joined(tables, beside), strict=True)):
        meant = by_name.get(alike(name)) if isinstance(name, str) else None
        if meant is not None and meant != number:
            raise UnbackdoorError(
                f"{where} has class {number} in row {row}, which it calls {name!r} in {beside}, but the model's class "
                f"{number} is {classes[number]!r}. Take the names, by --columns label={beside}."
            )


def columns_of(
    present: Sequence[str], encode: TextEncoder, given: dict[str, str], where: str, hint: str = ""
) -> dict[str, str]:
    """Which columns of a data set hold the texts: our name to the data's name.

    Args:
        present: the columns of the data.
        encode: of the model.
        given: the names that the user told.
        where: named in messages.
        hint: another way out where a column is missing.

    Raises:
        UnbackdoorError: there is no such column, or the model was trained on pairs and the data has single texts, or
            the other way round.
    """
    pair, single = ("text_a", "text_b"), ("text",)
    mixed = next((name for name in given if name in pair), None) if "text" in given else None
    if mixed is not None:
        raise UnbackdoorError(f"--columns names text and {mixed}; texts are single or pairs. Leave one of them out.")
    wanted = encode.columns
    if wanted is None:
        named = any(name in given for name in pair)
        wanted = pair if named or (set(pair) <= set(present) and "text" not in given) else single
    missing = [name for name in wanted if given.get(name, name) not in present]
    if missing:
        other = single if wanted == pair else pair
        if encode.columns is not None and all(given.get(name, name) in present for name in other):
            kind, came = ("pairs of texts", "single texts") if wanted == pair else ("single texts", "pairs of texts")
            raise UnbackdoorError(f"The model was trained on {kind}, but {where} holds {came}. Take data of its task.")
        held = printable(", ".join(present), 300)
        if "image" in present:
            raise UnbackdoorError(f"{where} holds images ({held}), but texts are needed. Take a data set with texts.")
        column = given.get(missing[0], missing[0])
        pairs = ", or pairs by --columns text_a=NAME,text_b=NAME" if wanted == single and encode.columns is None else ""
        raise UnbackdoorError(
            f"{where} has no column {column!r}; it has {held}. Name it by --columns {missing[0]}=NAME{pairs}{hint}."
        )
    return {name: given.get(name, name) for name in wanted}
