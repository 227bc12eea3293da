"""The columns of texts, pictures and labels in a data set, and whether all files have them."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from unbackdoor._data.labels import alike, class_numbers
from unbackdoor._data.reading import Table
from unbackdoor._errors import NoLabelsError, UnbackdoorError, few, printable

_PIXEL = re.compile(r"(pixel|px|p)?[ _.]?\d+([x_,]\d+)?", re.IGNORECASE)


def joined(tables: Sequence[Table], column: str) -> list[Any]:
    """Returns the cells of a column of all tables, one table after another."""
    return [cell for table in tables for cell in table.column(column)]


def check_column(tables: Sequence[Table], wanted: str, column: str, where: str) -> None:
    """Refuse a column that a table does not have, or has twice."""
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
    setting = "group='NAME'" if wanted == "group" else f"columns={{'{wanted}': 'NAME'}}"
    kind = NoLabelsError if wanted == "label" else UnbackdoorError
    raise kind(f"{where} has no column {column!r}; it has {listed(table.cells)}. Name it by `{setting}`{table.hint}.")


def listed(columns: Iterable[str]) -> str:
    """Returns the names of columns, for a message."""
    return printable(", ".join(columns), 300)


def labels_of(
    tables: Sequence[Table], column: str, classes: Sequence[str] | None, where: str
) -> tuple[Tensor, tuple[str, ...] | None]:
    """The class of each example, (n,), and the names of the classes; see `class_numbers`.

    Args:
        tables: that have the column.
        column: of the labels.
        classes: the model's class names, if it has any.
        where: named in messages.
    """
    stands_for = tables[0].names.get(column)
    if any(table.names.get(column) != stands_for for table in tables):
        raise UnbackdoorError(f"{where} has files that name their classes otherwise. Give them one by one.")
    labels, known = class_numbers(joined(tables, column), stands_for, classes, where)
    _check_label_names(tables, column, labels, known, where)
    return labels, known


def _check_label_names(
    tables: Sequence[Table], label: str, labels: Tensor, classes: Sequence[str] | None, where: str
) -> None:
    """Refuse numbers as labels if a column next to them gives them the names of other classes of the model."""
    named = next((name for name in ("label_text", "label_name") if all(name in table.cells for table in tables)), None)
    if named is None or named == label or classes is None:
        return
    by_name = {alike(name): number for number, name in enumerate(classes)}
    for row, (number, name) in enumerate(zip(labels.tolist(), joined(tables, named), strict=True)):
        meant = by_name.get(alike(name)) if isinstance(name, str) else None
        if meant is not None and meant != number:
            raise UnbackdoorError(
                f"{where} has class {number} in row {row}, which it calls {name!r} in {named}, but the model's class "
                f"{number} is {classes[number]!r}. Take the names, by `columns={{'label': '{named}'}}`."
            )


def image_column(present: Sequence[str], names: dict[str, str], where: str) -> dict[str, str]:
    """Returns the column that holds the pictures, `image` or `file_name`: `image` to the data's name.

    Args:
        present: the columns of the data.
        names: the data's names by the library's, if the user gave them.
        where: name of the data, for messages.

    Raises:
        UnbackdoorError: the data holds texts.
    """
    if "image" not in [*present, *names] and "file_name" in present:  # as image folders of `datasets` have it
        return {"image": "file_name"}
    pixels = [name for name in present if _PIXEL.fullmatch(name)]
    if "image" not in [*present, *names] and len(pixels) > 15:
        raise UnbackdoorError(
            f"{where} has each pixel in a column of its own ({few(pixels)}), and such are not read. Save pictures, or "
            "lists of numbers in one column, in JSON lines or parquet."
        )
    if "image" not in [*present, *names] and {"text", "text_a"} & set(present):
        raise UnbackdoorError(
            f"{where} holds text ({listed(present)}), but images are needed. Take a data set with pictures, or a model "
            "for text (attack: `base`)."
        )
    return {"image": names.get("image", "image")}


def text_columns(
    present: Sequence[str], names: dict[str, str], where: str, *, trained_on: tuple[str, ...] | None, hint: str = ""
) -> dict[str, str]:
    """Returns the columns that hold the texts: the library's names to the data's.

    Args:
        present: the columns of the data.
        names: the data's names by the library's, if the user gave them.
        where: name of the data, for messages.
        trained_on: the columns that the model was trained on, `text`, or `text_a` and `text_b`; None if not known.
        hint: another way out if a column is missing.

    Raises:
        UnbackdoorError: there is no such column, or the model was trained on pairs and the data has single texts, or
            the other way round.
    """
    pair, single = ("text_a", "text_b"), ("text",)
    mixed = next((name for name in names if name in pair), None) if "text" in names else None
    if mixed is not None:
        raise UnbackdoorError(f"`columns` names text and {mixed}; texts are single or pairs. Leave one of them out.")
    wanted = trained_on
    if wanted is None:
        named = any(name in names for name in pair)
        wanted = pair if named or (set(pair) <= set(present) and "text" not in names) else single
    missing = [name for name in wanted if names.get(name, name) not in present]
    if missing:
        other = single if wanted == pair else pair
        if trained_on is not None and all(names.get(name, name) in present for name in other):
            kind, other_kind = (
                ("pairs of texts", "single texts") if wanted == pair else ("single texts", "pairs of texts")
            )
            raise UnbackdoorError(
                f"The model was trained on {kind}, but {where} holds {other_kind}. Take data of its task."
            )
        if "image" in present:
            raise UnbackdoorError(
                f"{where} holds images ({listed(present)}), but texts are needed. Take a data set with texts."
            )
        column = names.get(missing[0], missing[0])
        pairs = ", or pairs by `columns={'text_a': 'NAME', 'text_b': 'NAME'}`"
        raise UnbackdoorError(
            f"{where} has no column {column!r}; it has {listed(present)}. Name it by `columns={{'{missing[0]}': "
            f"'NAME'}}`{pairs if wanted == single and trained_on is None else ''}{hint}."
        )
    return {name: names.get(name, name) for name in wanted}
