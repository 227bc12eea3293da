"""The size in memory of columns stored as dictionaries or runs: a few bytes may stand for terabytes."""

from collections.abc import Iterable
from typing import Any

from unbackdoor._errors import UnbackdoorError
from unbackdoor._inputs import MEBIBYTE

_ALLOWANCE = 256 * MEBIBYTE  # allowed for files of any length
_RATIO = 100  # bytes in memory for each byte of a longer file; text and pictures have 1 to 20
_CELL = 64  # bytes that Python takes for a cell, whatever is in it


def parts_of_parquet(content: Any) -> Iterable[Any]:
    """The row groups of a parquet file as tables that keep texts and pictures in dictionaries.

    The first item is a number instead: the fewest bytes that all cells take.
    """
    from pyarrow import parquet

    plain = parquet.ParquetFile(content)
    columns = [plain.schema.column(number) for number in range(len(plain.schema))]
    yield plain.metadata.num_rows * (4 * _CELL + 8 * len(columns))
    folded = parquet.ParquetFile(
        content, read_dictionary=[column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    )
    for number in range(folded.num_row_groups):
        yield folded.read_row_group(number)


def check_unfolded(parts: Iterable[Any], stored: int, where: object) -> None:
    """Refuse a table that takes far more memory than its file has bytes.

    Args:
        parts: tables of pyarrow that belong together, or numbers of bytes.
        stored: number of bytes of the file or files.
        where: name of the data, for messages.

    Raises:
        UnbackdoorError: the table takes far more memory.
    """
    most = max(_ALLOWANCE, _RATIO * stored)
    total = 0
    for part in parts:
        total += part if isinstance(part, int) else sum(map(_unfolded, part.itercolumns()))
        if total > most:
            raise UnbackdoorError(
                f"{where} has {stored:,} bytes, but its rows take more than {most:,} in memory. Nothing of its kind "
                "is repeated as often; check what it is."
            )


def _unfolded(column: Any) -> int:
    """The bytes of an array, with each entry of a dictionary counted as often as it is used."""
    import pyarrow as pa
    from pyarrow import compute

    if isinstance(column, pa.ChunkedArray):
        return sum(map(_unfolded, column.chunks))
    if isinstance(column, pa.ExtensionArray):
        return _unfolded(column.storage)
    if isinstance(column, pa.DictionaryArray):
        try:
            lengths = compute.binary_length(column.dictionary).cast(pa.int64())
        except pa.ArrowNotImplementedError:  # entries that are neither text nor bytes, but numbers
            return len(column) * _CELL
        return len(column) * _CELL + (compute.sum(lengths.take(column.indices)).as_py() or 0)
    if isinstance(column, pa.StructArray):
        return sum(_unfolded(column.field(number)) for number in range(column.type.num_fields))
    if isinstance(column, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        return _unfolded(column.flatten()) + len(column) * _CELL
    return int(column.nbytes)
