"""Tables in text files: cells between commas, semicolons or tabs, with their text unchanged."""

import codecs
import csv
import io
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unbackdoor._errors import UnbackdoorError, few, printable
from unbackdoor._inputs import MEBIBYTE, open_file

logger = logging.getLogger("unbackdoor")

_DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
_ANNOUNCED = re.compile('"?sep=.?"?')  # the line that Excel reads before the names of the columns
_MARKS = {  # the long ones first: UTF-32 begins as UTF-16 does
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
MOST_CHARACTERS = 10_000_000  # characters of a cell
MOST_BYTES = 4 * 1024 * MEBIBYTE  # bytes of a table in a text file, which is read as a whole


def decoded(file: Path) -> str:
    """Returns the text of a file in UTF-8, with or without a byte order mark.

    Raises:
        UnbackdoorError: the file is in another encoding, or not text.
    """
    with open_file(file, MOST_BYTES) as opened:
        content = opened.read(MEBIBYTE)
        if b"\0" not in content:  # else a file of zeros would be read as a whole, only to be refused
            opened.seek(0)
            content = opened.read()
    marked = next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)
    if marked is not None:
        raise UnbackdoorError(
            f"{file} is in {marked}, but data is read as UTF-8. Save it as UTF-8, as iconv -f {marked} -t UTF-8 does."
        )
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise UnbackdoorError(
            f"{file} holds a NUL character in line {line}; it is UTF-16 without a mark, or not text. Save it as UTF-8."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise UnbackdoorError(
            f"{file} is not in UTF-8 (byte 0x{content[problem.start]:02X} in line {line}); it is probably in Latin-1 "
            "or Windows-1252. Save it as UTF-8, as iconv -f WINDOWS-1252 -t UTF-8 does."
        ) from None


def read_delimited(file: Path, label: str) -> tuple[dict[str, list[str | None]], frozenset[str]]:
    """Reads the columns of a CSV or TSV file.

    The first line names the columns, and shows whether a comma, semicolon, tab or bar separates them. The text of a
    cell is not changed: 007, 1e5 and NA do not become numbers. An empty cell is None.

    Args:
        file: a file in UTF-8.
        label: the column of labels; it shows which rows a quotation mark has swallowed.

    Returns:
        The cells by column, and the names that several columns share; these columns are left out.

    Raises:
        UnbackdoorError: it is in another encoding, a row has more or fewer cells than there are columns, or a quotation
            mark is not closed; names the line.
    """
    lines = list(io.StringIO(decoded(file), newline=""))
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith(("{", "[")):
        raise UnbackdoorError(
            f"{file} is JSON by its content, although its name says otherwise. Let its name end in .jsonl."
        )
    if _ANNOUNCED.fullmatch(first.strip()):  # what separates the cells is seen below
        lines[lines.index(first)] = "\n"
        first = next((line for line in lines if line.strip()), "")
    widths = {delimiter: len(_row(first, delimiter)) for delimiter in _DELIMITERS}
    delimiter = max(widths, key=widths.__getitem__)  # the comma if there is a tie
    if file.suffix.lower() == ".tsv" and widths["\t"] > 1:
        delimiter = "\t"
    spaced = any(name[:1] == " " and name.strip() for name in _row(first, delimiter)[1:])  # as in `text, label`
    try:
        rows, spans = _rows(file, lines, delimiter, spaced)
        _check_rows(file, rows, spans, delimiter)
        _check_swallowed(file, lines, rows, spans, delimiter, label)
    except UnbackdoorError:
        if (plain := _without_marks(lines, delimiter)) is None:
            raise
        rows, spans = plain
        _check_rows(file, rows, spans, delimiter)
        logger.info("%s: quotation marks are part of its cells, as not all of them begin and end one.", file)
    if not rows:
        return {}, frozenset()
    names = [name.strip() for name in rows[0]]
    counts = Counter(names)
    columns = zip(*rows[1:], strict=True) if len(rows) > 1 else [() for _ in names]
    cells = {
        name: [cell or None for cell in column]
        for name, column in zip(names, columns, strict=True)
        if counts[name] == 1
    }
    return cells, frozenset(name for name, count in counts.items() if count > 1)


def _without_marks(lines: Sequence[str], delimiter: str) -> tuple[list[list[str]], list[tuple[int, int]]] | None:
    """As `_rows`, for a table whose quotation marks are letters, as most of those between tabs are.

    None if it cannot be one: lines differ in their number of cells, or a mark within marks is written twice.
    """
    numbered = [(number, line.rstrip("\r\n").split(delimiter)) for number, line in enumerate(lines, 1) if line.strip()]
    rows = [row for _, row in numbered]
    doubled = any(cell[:1] == cell[-1:] == '"' and '""' in cell[1:-1] for row in rows for cell in row)
    if delimiter != "\t" or doubled or len({len(row) for row in rows}) > 1:
        return None
    return rows, [(number, number) for number, _ in numbered]


def _rows(
    file: Path, lines: Sequence[str], delimiter: str, spaced: bool
) -> tuple[list[list[str]], list[tuple[int, int]]]:
    """The cells of each row, and its first and last line, from 1; lines without a cell are left out.

    With `spaced`, blanks behind a delimiter are not part of a cell, so that a quotation mark may follow them.
    """
    rows: list[list[str]] = []
    spans: list[tuple[int, int]] = []
    before = csv.field_size_limit(MOST_CHARACTERS)  # a limit of the process, which others may rely on
    try:
        reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=spaced)
        while True:
            start = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return rows, spans
            except csv.Error as problem:
                if "field limit" in str(problem):
                    raise UnbackdoorError(
                        f"{file} has a cell of more than {MOST_CHARACTERS:,} characters in line {start}. Shorten "
                        "it; models read only the beginning."
                    ) from None
                raise UnbackdoorError(
                    f"{file} has a quotation mark in line {start} that is not closed at the end of a cell, so it would "
                    "take other rows into that cell. Write it twice, or save the data as JSON lines."
                ) from None
            alone = bool(rows) and len(rows[0]) == 1  # then a row without text is "", as pandas writes it, or blanks
            if any(cell.strip() for cell in row) or len(row) > 1 or (alone and row):
                rows.append(row)
                spans.append((start, reader.line_num))
    finally:
        csv.field_size_limit(before)


def _check_rows(file: Path, rows: Sequence[Sequence[str]], spans: Sequence[tuple[int, int]], delimiter: str) -> None:
    """Refuse cells in single quotation marks, rows that are longer or shorter, and the names of the columns as a row.

    Args:
        file: the file, for messages.
        rows: the cells of each row; the first names the columns.
        spans: first and last line of each row.
        delimiter: what separates the cells.
    """
    names, rows, spans = [name.strip() for name in (rows or [[]])[0]], rows[1:], spans[1:]
    if any(names) and all(_in_single_marks(name) for name in names if name):
        raise UnbackdoorError(
            f"{file} has the names of its columns in single quotation marks ({few(names)}), which are part of a cell. "
            'Write double ones (").'
        )
    for row, (start, _) in zip(rows, spans, strict=True):
        if len(row) != len(names):
            marks, hint = "quotation marks", ""
            if any(cell.lstrip().startswith("'") for cell in row):
                marks, hint = 'double quotation marks (")', "; single ones are part of a cell"
            way_out = (
                "Remove the lines before the one that names the columns."
                if len(names) == 1
                else f"Remove {_DELIMITERS[delimiter]} at the end of the lines, or name that column."
                if len(row) == len(names) + 1 and not row[-1].strip() and len(row[0]) > 0
                else f"Put {marks} around cells that hold {_DELIMITERS[delimiter]}{hint}, or save the data as JSON "
                "lines."
            )
            raise UnbackdoorError(
                f"{file} has {len(row)} cells in line {start}, but its first line names {len(names)} "
                f"column{'s' * (len(names) > 1)}. {way_out}"
            )
        if len(names) > 1 and row[0].strip() == names[0] and [cell.strip() for cell in row] == names:
            raise UnbackdoorError(
                f"{file} names its columns in line {start} once more, as files that were put together do. Remove that "
                "line."
            )
    for place, name in enumerate(names):
        cells = (row[place] for row in rows if row[place])
        if _in_single_marks(next(cells, "")) and all(map(_in_single_marks, cells)):
            logger.info("%s: single quotation marks around the cells of %s are part of them.", file, printable(name))


def _in_single_marks(cell: str) -> bool:
    return len(cell.strip()) > 1 and cell.strip()[0] == cell.strip()[-1] == "'"


def _check_swallowed(
    file: Path,
    lines: Sequence[str],
    rows: Sequence[Sequence[str]],
    spans: Sequence[tuple[int, int]],
    delimiter: str,
    label: str,
) -> None:
    """Refuse a row over several lines of which more than one is a row of its own, with a label that other rows have.

    A quotation mark that is not closed takes all rows up to the next one into its cell. Without labels, the number of
    cells says what is a row of its own, between tabs alone, which texts have rarely.
    """
    names = [name.strip() for name in rows[0]] if rows else []
    if label not in names and (delimiter != "\t" or len(names) < 2):
        return
    width, place = len(names), names.index(label) if label in names else 0
    many = [start != end for start, end in spans]
    labels = {row[place] for row, several in zip(rows[1:], many[1:], strict=True) if not several}
    labels = labels or {row[place] for row in rows[1:]}
    for start, end in (span for span, several in zip(spans, many, strict=True) if several):
        alone = [_row(line, delimiter, csv.QUOTE_NONE) for line in lines[start - 1 : end]]
        if sum(len(cells) == width and (label not in names or cells[place] in labels) for cells in alone) > 1:
            raise UnbackdoorError(
                f"{file} has a quotation mark in line {start} that is closed in line {end}, but the lines between look "
                "like rows of their own. Write it twice if it is part of a text, or save the data as JSON lines."
            )


def _row(line: str, delimiter: str, quoting: Any = csv.QUOTE_MINIMAL) -> list[str]:
    return next(csv.reader([line.rstrip("\r\n")], delimiter=delimiter, quoting=quoting), [])
