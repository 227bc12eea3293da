"""Sources of examples: the files and the split that a path means, and the columns of these files, unchanged."""

import glob
import itertools
import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unbackdoor._data.delimited import decoded, read_delimited
from unbackdoor._data.labels import alike
from unbackdoor._data.unfolding import check_unfolded, parts_of_parquet
from unbackdoor._errors import NoLabelsError, UnbackdoorError, few, printable
from unbackdoor._inputs import CONFIG, check_file, exists, open_file, read_json

logger = logging.getLogger("unbackdoor")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns by name.

    Args:
        cells: by column, a list or an arrow array.
        names: by column, the names that its whole numbers stand for.
        twice: names of several columns; these are not among the cells.
        folder: folder that relative paths in it start from.
        hint: the way out if a column is missing and the first line of the file does not look like names.
    """

    cells: dict[str, Any]
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    twice: frozenset[str] = frozenset()
    folder: Path
    hint: str = ""

    def column(self, name: str) -> list[Any]:
        """The cells of a column as Python values."""
        cells = self.cells[name]
        return cells if isinstance(cells, list) else cells.to_pylist()


def opened(
    source: str | Path | Sequence[str | Path],
    where: str,
    *,
    label: str,
    classes: Sequence[str] | None,
    labelled: bool = True,
) -> list[Table]:
    """Returns the tables that a source names, in order; their columns may differ.

    Args:
        source: a source for `Dataset.load`.
        where: name of the data, for messages.
        label: the column of labels.
        classes: the model's class names; a folder with one of these names is a class, not a split.
        labelled: False takes the pictures of a folder at any depth, whatever its sub-folders stand for.

    Raises:
        UnbackdoorError: the source does not exist, is of an unknown kind, cannot be read, or may mean several data
            sets.
    """
    files: list[Path] = []
    for path in [source] if isinstance(source, str | Path) else source:
        files += _matches(path)
    if len(files) > 1 and any(file.is_dir() for file in files):
        raise UnbackdoorError(f"{where} has a folder among several parts; data is one folder, or files.")
    try:
        if files[0].is_dir():
            return _of_folder(files[0], classes, label, labelled)
        return _of_files(files, label)
    except UnbackdoorError:
        raise
    except Exception as problem:  # whatever a reader of a foreign format may raise
        reason = printable(str(problem).split("\n")[0] or type(problem).__name__, 200).rstrip(".")
        raise UnbackdoorError(f"{where} cannot be read ({reason}). Repair it, or take other data.") from problem


def _matches(path: str | Path) -> list[Path]:
    """Returns the file or folder of this name; if there is none, its matches as a pattern."""
    if not str(path):  # Path would read it as the current directory
        raise UnbackdoorError("The data must be a file or a folder with labelled examples, got an empty name.")
    if exists(path):
        return [Path(path)]
    # Brackets in the name of a folder that exists are not a pattern.
    known = next(parent for parent in [*Path(path).parents, Path()] if parent.exists())
    pattern = Path(path).relative_to(known) if known != Path() else Path(path)
    matches = sorted(known / match for match in glob.glob(str(pattern), root_dir=known, recursive=True))
    if not matches:
        raise _absent(str(path))
    splits: dict[str, Path] = {}
    for match in matches:
        inside = match.relative_to(known)
        split = next(filter(None, map(_split_of, [inside.stem, *reversed(inside.parent.parts)])), None)
        splits.setdefault(split or "", match)
    if len(splits) > 1:
        raise UnbackdoorError(
            f"{path} matches several splits ({', '.join(str(match) for match in splits.values())}), but only one is "
            "read. Name one, or give each file."
        )
    return matches


_FETCH = "hf download {} --repo-type dataset --local-dir FOLDER"


def _absent(path: str) -> UnbackdoorError:
    hub = re.fullmatch(r"(?:https?://huggingface\.co/datasets/)?([\w-][\w.-]*/[\w.-]+)(?:/tree/\w+)?/?", path)
    if hub is not None and not exists(Path(path).parent):
        return UnbackdoorError(
            f"{path} does not exist here, and data is not fetched from the Hub. Fetch it by {_FETCH.format(hub[1])}, "
            "and give a file or a folder of that."
        )
    if "://" in path:
        return UnbackdoorError(f"{path} is an address, and data is not fetched. Download it, and give the file.")
    return UnbackdoorError(f"{path} does not exist; data is a file or a folder with labelled examples.")


# Files.


def _of_files(files: Sequence[Path], label: str) -> list[Table]:
    for file in files:
        check_file(file)
        if file.suffix.lower() not in _READERS:
            raise _unknown(file)
    suffixes = {file.suffix.lower() for file in files}
    if len({_READERS[suffix] for suffix in suffixes}) > 1:
        raise UnbackdoorError(f"Files that are joined must be of one kind, got {', '.join(sorted(suffixes))}.")
    if not suffixes <= {".parquet"} and len({file.parent for file in files}) > 1:
        raise UnbackdoorError(
            f"{files[0]} and {files[-1]} are in two folders, but pictures are found relative to one. Join them."
        )
    tables = []
    for file in files:
        with open_file(file) as content:
            start = content.read(8)
        held = next((kind for mark, kind in _MARKS.items() if start.startswith(mark)), None)
        if held is not None and held[1] != file.suffix.lower().replace(".feather", ".arrow"):
            raise UnbackdoorError(f"{file} is {held[0]} by its content, although its name says otherwise. {held[2]}")
        tables.append(_READERS[file.suffix.lower()](file, label))
    return tables


def _unknown(file: Path) -> UnbackdoorError:
    if file.suffix.lower() == ".tar":
        return UnbackdoorError(
            f"{file} is an archive, which is not read. Unpack it, and give its content; labels of a WebDataset "
            "belong into a metadata.csv with the columns file_name and label."
        )
    if file.suffix.lower() in _COMPRESSED:
        return UnbackdoorError(
            f"{file} is compressed, and compressed data is not read. Unpack it, and give its content."
        )
    if file.suffix.lower() in (".xlsx", ".xls", ".ods"):
        return UnbackdoorError(f"{file} is a spreadsheet, which is not read. Save it as CSV in UTF-8.")
    return UnbackdoorError(
        f"{file} is of an unknown kind; data is .parquet, .csv, .tsv, .json, .jsonl, .arrow, an image folder or a "
        "saved data set. Save it as one of these."
    )


def _parquet(file: Path, _label: str) -> Table:
    from pyarrow import parquet

    with open_file(file) as content:
        check_unfolded(parts_of_parquet(content), file.stat().st_size, file)
        return _arrow_table(parquet.ParquetFile(content).read(), file.parent)


def _arrow(file: Path, _label: str) -> Table:
    from pyarrow import ipc

    with open_file(file) as content:
        indexed = content.read(6) == b"ARROW1"
        content.seek(0)
        table = (ipc.open_file if indexed else ipc.open_stream)(content).read_all()
        check_unfolded([table], file.stat().st_size, file)
        return _arrow_table(table, file.parent)


def _arrow_table(table: Any, folder: Path) -> Table:
    counts = Counter(table.column_names)
    once = [name for name in table.column_names if counts[name] == 1]
    return Table(
        cells={name: table.column(name) for name in once},
        names=_class_labels((table.schema.metadata or {}).get(b"huggingface")),
        twice=frozenset(counts) - frozenset(once),
        folder=folder,
    )


def _class_labels(metadata: bytes | None) -> dict[str, tuple[str, ...]]:
    """The names of `ClassLabel` columns, from what `datasets` writes into the metadata of a table."""
    try:
        features = json.loads(metadata or b"{}")["info"]["features"]
        entries = {name: entry["names"] for name, entry in features.items() if entry.get("_type") == "ClassLabel"}
    except (ValueError, TypeError, KeyError, AttributeError):  # written by something else
        return {}
    return {
        name: tuple(classes)
        for name, classes in entries.items()
        if isinstance(classes, list) and all(isinstance(each, str) for each in classes)
    }


def _csv(file: Path, label: str) -> Table:
    cells, twice = read_delimited(file, label)
    nameless = any(" " in name or name[:1].isdecimal() for name in cells)
    hint = ", or let the first line of the file name the columns" if nameless else ""
    return Table(cells=cells, twice=twice, folder=file.parent, hint=hint)


def _json(file: Path, _label: str) -> Table:
    """Reads JSON lines, objects one after another, or one array of objects."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise UnbackdoorError(f"{file} has an object with two entries of the name {twice!r}. Rename one.")
        return entries

    text = decoded(file)
    decoder = json.JSONDecoder(object_pairs_hook=once)
    rows: list[Any] = []
    blank = re.compile(r"\s*")
    position = blank.match(text).end()  # type: ignore[union-attr]
    array = text[position : position + 1] == "["
    while position < len(text):
        value, position = decoder.raw_decode(text, position)
        position = blank.match(text, position).end()  # type: ignore[union-attr]
        rows.append(value)
    if array and len(rows) == 1:
        rows = rows[0]
    if len(rows) == 1 and isinstance(rows[0], dict) and _holds_table(rows[0]):
        raise UnbackdoorError(
            f"{file} holds whole columns or tables ({few(list(rows[0]))}) in one object, not an object for each row. "
            "Save rows, as DataFrame.to_json(FILE, orient='records', lines=True) does."
        )
    strange = next((row for row, value in enumerate(rows) if not isinstance(value, dict)), None)
    if strange is not None:
        raise UnbackdoorError(
            f"{file} has no object in row {strange}. Each row must be one, as {{"
            '"text": "...", "label": 0}, in lines of their own or in one array.'
        )
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(cells={name: [row.get(name) for row in rows] for name in names}, folder=file.parent)


def _holds_table(row: dict[str, Any]) -> bool:
    """Whether an object has the columns of a table, as pandas writes them, or its rows under some name."""
    entries = list(row.values())
    if any(map(_is_conversation, entries)):
        return False
    rows = any(isinstance(entry, list) and entry and all(isinstance(each, dict) for each in entry) for entry in entries)
    return rows or (bool(entries) and all(isinstance(entry, list | dict) for entry in entries))


def _is_conversation(entry: Any) -> bool:
    turns = entry if isinstance(entry, list) else []
    return bool(turns) and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)


_READERS: dict[str, Callable[[Path, str], Table]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _csv,
    ".json": _json,
    ".jsonl": _json,
    ".ndjson": _json,
    ".arrow": _arrow,
    ".feather": _arrow,
}
# By the first bytes of files: their kind, its suffix, and the way out.
_MARKS = {
    b"PAR1": ("parquet", ".parquet", "Let its name end in .parquet."),
    b"ARROW1": ("arrow", ".arrow", "Let its name end in .arrow."),
    b"FEA1": ("feather of version 1", "", "Save it as parquet."),
    b"\x1f\x8b": ("compressed", ".gz", "Unpack it."),
    b"\x28\xb5\x2f\xfd": ("compressed", ".zst", "Unpack it."),
    b"\xfd7zXZ": ("compressed", ".xz", "Unpack it."),
    b"BZh9": ("compressed", ".bz2", "Unpack it."),
    b"7z\xbc\xaf": ("compressed", ".7z", "Unpack it."),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", ".zip", "Unpack it, or save it as CSV in UTF-8."),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet", ".xls", "Save it as CSV in UTF-8."),
    b"SQLite f": ("a database of SQLite", ".sqlite", "Write its table as CSV in UTF-8."),
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz", ".rar")


# Folders.

_IGNORED = {"__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
_UNREPORTED = {"thumbs.db", "desktop.ini"}  # files that picture viewers leave behind
_NO_DATA = {"dataset_info.json", "dataset_infos.json", "state.json", "config.json", "package.json"}
_SPLITS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("test", "testing", "testset"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "valset", "dev", "devel", "development", "devset"), "validation"),
    **dict.fromkeys(("eval", "evaluation", "evalset"), "evaluation"),
}
_PART = re.compile(r"(^|[-_.])\d+([-_.]of[-_.]\d+)?([-_.][0-9a-f]{6,})?$")
_UNIQUE = re.compile(r"[0-9a-f]{8}(-?)([0-9a-f]{4}\1){3}[0-9a-f]{12}")  # as Spark and Arrow name the parts they write


def _split_of(name: str) -> str | None:
    """Returns the split that a file or a folder names, as a whole or in one of its words.

    >>> [_split_of(name) for name in ("Training", "reviews_TEST", "valSet2", "contest", "train-00000-of-00002")]
    ['train', 'test', 'validation', None, 'train']
    """
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    whole = [*words, *map("".join, itertools.pairwise(words))]  # valSet
    return next((_SPLITS[word.casefold()] for word in whole if word.casefold() in _SPLITS), None)


def _refused_several(folder: Path, names: Sequence[str], kind: str, example: str) -> UnbackdoorError:
    shown = [*map(printable, sorted(names)[:8]), *["..."] * (len(names) > 8)]
    return UnbackdoorError(
        f"{folder} holds {kind} ({', '.join(shown)}), but only one is read. Name it, as in {folder / example}."
    )


@dataclass
class _Content:
    """The files of a folder at any depth, without hidden ones; paths are relative to it."""

    pictures: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> "_Content":
        from unbackdoor._data.decoding import picture_endings  # imports Pillow

        known, content = picture_endings(), cls()
        for path in _files_in(folder):
            suffix = path.suffix.lower()
            if suffix in known:
                content.pictures.append(path)
            elif suffix in _READERS and path.name not in _NO_DATA:
                content.tables.append(path)
            elif path.name.casefold() not in _UNREPORTED:
                content.others.append(path)
        return content


def _files_in(folder: Path) -> Iterator[Path]:
    """Files at any depth, sorted; links to folders are followed if they are in the folder itself."""
    for entry in sorted(folder.iterdir()):
        if _hidden(entry.name):
            continue
        if not entry.is_dir():
            yield entry.relative_to(folder)
            continue
        paths = []
        for inside, folders, files in os.walk(entry):
            folders[:] = [name for name in folders if not _hidden(name)]
            paths += [Path(inside, name).relative_to(folder) for name in files if not _hidden(name)]
        yield from sorted(paths)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in _IGNORED


def _of_folder(folder: Path, classes: Sequence[str] | None, label: str, labelled: bool) -> list[Table]:
    if (folder / "dataset_dict.json").exists():
        splits = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        raise _refused_several(folder, splits, "splits", splits[-1] if splits else "train")
    if (folder / "dataset_info.json").exists() and (folder / "state.json").exists():
        return [_saved(folder)]
    content = _Content.of(folder)
    if not labelled and content.pictures and not content.tables:
        _report_undecoded(folder, content)
        return [Table(cells={"image": [str(path) for path in content.pictures]}, folder=folder)]
    top = [path for path in content.tables if len(path.parts) == 1]
    with_classes = {path.parts[0] for path in content.pictures if len(path.parts) > 1}
    if with_classes and not (top and len(with_classes) == 1):  # else that folder has the pictures of the table
        described = _described(folder, content, label)
        if described is not None:
            logger.info("%s: labels are those of its metadata, not the names of its sub-folders.", folder)
            _report_unnamed(folder, content, [described])
            return [described]
        columnar = [path.name for path in top if path.suffix.lower() in (".parquet", ".arrow")]
        if columnar:
            raise _refused_several(
                folder, [*with_classes, *columnar], "folders of pictures next to a table", columnar[0]
            )
        return [_image_folder(folder, content, classes)]
    parts = _parts(folder, top or content.tables)
    if parts:
        if len(parts[0].parts) > 1:
            more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
            logger.info("%s: its examples are read from %s%s.", folder, parts[0], more)
        _report_missing_parts(folder, parts)
        tables = _of_files([folder / part for part in parts], label)
        _report_unnamed(folder, content, tables)
        return tables
    if content.others and not content.pictures:
        raise _nothing_read(folder, content.others)
    if content.pictures or not any(entry.is_dir() and not _hidden(entry.name) for entry in folder.iterdir()):
        raise _no_classes(folder, content)
    return []


def _no_classes(folder: Path, content: _Content) -> UnbackdoorError:
    """Returns the error for a folder without sub-folders; it says what to do with files next to its pictures."""
    holding = "pictures but " if content.pictures else ""
    stems = {path.with_suffix("") for path in content.pictures}
    beside = {path.suffix.lower() for path in content.others if path.with_suffix("") in stems}
    way_out = ""
    if beside & {".txt", ".caption"}:
        way_out = " Captions belong into a metadata.csv with the columns file_name and caption."
    elif ".cls" in beside:  # as WebDataset has them
        way_out = " Labels belong into a metadata.csv with the columns file_name and label."
    return NoLabelsError(
        f"{folder} has {holding}no sub-folders; an image folder has one per class, with its pictures.{way_out}"
    )


def _described(folder: Path, content: _Content, label: str) -> Table | None:
    """Returns the metadata that label all pictures of a folder, which `datasets` also prefers; None without any."""
    found = {
        path: table
        for path in content.tables
        if path.stem == "metadata"
        for table in _of_files([folder / path], label)
        if {"file_name", label} <= table.cells.keys()
    }
    if len(found) > 1:
        raise _refused_several(folder, [str(path) for path in found], "several tables of pictures", str(min(found)))
    return next(
        (
            table
            for path, table in found.items()
            if all(picture.is_relative_to(path.parent) for picture in content.pictures)
        ),
        None,
    )


def _nothing_read(folder: Path, others: Sequence[Path]) -> UnbackdoorError:
    """Returns the error for a folder with neither pictures nor a table; it says what to do with its files."""
    from unbackdoor._data.decoding import undecoded  # imports Pillow

    endings = {path.suffix.lower() for path in others}
    way_out = "Save the data as one of these."
    if any(map(undecoded, others)):
        way_out = "Save the pictures as JPEG or PNG."
    elif endings & set(_COMPRESSED):
        way_out = "Unpack what is compressed."
    elif ".txt" in endings and any(len(path.parts) > 1 for path in others):
        way_out = "If each file is one text, write them into a CSV file with the columns text and label."
    return UnbackdoorError(
        f"{folder} holds only files that are not read ({few(sorted(others))}); data is .parquet, .csv, .tsv, .json, "
        f".jsonl, .arrow, or pictures with one folder per class. {way_out}"
    )


def _report_undecoded(folder: Path, content: _Content) -> None:
    """Warn of pictures of a kind that is not read, and refuse a folder that holds more of these than of others."""
    from unbackdoor._data.decoding import undecoded  # imports Pillow

    left = [path for path in content.others if undecoded(path)]
    if not left:
        return
    count = f"{len(left):,} of {len(left) + len(content.pictures):,} pictures"
    kinds = f"{few(sorted({path.suffix.lower() for path in left}))}, such as {printable(left[0])}"
    if len(left) > len(content.pictures):
        raise UnbackdoorError(f"{folder} has {count} in a format that is not read ({kinds}). Save them as JPEG or PNG.")
    logger.warning(
        "%s: %s are left out, as their format is not read (%s). Save them as JPEG or PNG.", folder, count, kinds
    )


def _parts(folder: Path, tables: Sequence[Path]) -> list[Path]:
    """Returns the files of a single data set: their names differ only in the number of the part."""
    sets: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in tables:
        stem = re.sub(r"\d+", "", _UNIQUE.sub("", path.stem)) if _UNIQUE.search(path.stem) else path.stem
        sets[str(path.parent / "_")[:-1] + _PART.sub("", stem), path.suffix].append(path)
    if len(sets) > 1:
        partitions = sorted({part for path in tables for part in path.parent.parts if "=" in part})
        if partitions:
            written = folder.with_name(f"{folder.name}.parquet")
            raise UnbackdoorError(
                f"{folder} has a column in the names of its folders ({few(partitions)}), and such are not read. Write "
                f"it as one file first: pandas.read_parquet({str(folder)!r}).to_parquet({str(written)!r})."
            )
        roots = [root for root, _ in sets]
        names = [
            root if root and roots.count(root) == 1 else str(paths[0]) if not root else root + suffix
            for (root, suffix), paths in sets.items()
        ]
        kind = "splits" if any(map(_split_of, names)) else "several data sets"
        (root, suffix), paths = max(sets.items())
        raise _refused_several(folder, names, kind, str(paths[0]) if len(paths) == 1 else f"{root}*{suffix}")
    return [path for paths in sets.values() for path in paths]


def _report_unnamed(folder: Path, content: _Content, tables: Sequence[Table]) -> None:
    """Log how many pictures of a folder none of its tables names, as they are left out."""
    named: set[str] = set()
    for table in tables:
        column = next((name for name in ("image", "file_name") if name in table.cells), None)
        cells = [] if column is None else table.column(column)
        if not cells or not all(isinstance(cell, str) for cell in cells):
            return
        named.update(os.path.normpath(table.folder / cell) for cell in cells)
    left = [path for path in content.pictures if os.path.normpath(folder / path) not in named]
    if left and len(left) < len(content.pictures):
        logger.info(
            "%s: %s of its %s pictures are not named in its table, and are left out, such as %s.",
            folder,
            f"{len(left):,}",
            f"{len(content.pictures):,}",
            left[0],
        )


_OF_ALL = re.compile(r"(\d+)[-_.]of[-_.](\d+)")


def _report_missing_parts(folder: Path, parts: Sequence[Path]) -> None:
    """Warn if the names of files say that there are more of them, as after a download that was broken off."""
    numbers = [match for part in parts if (match := _OF_ALL.search(part.stem))]
    held, total = {int(match[1]) for match in numbers}, max((int(match[2]) for match in numbers), default=0)
    if numbers and len(held) < total:
        logger.warning(
            "%s has %d of the %d parts that the names of its files count (%s); examples of the others are missing. "
            "Fetch them, too.",
            folder,
            len(held),
            total,
            few(sorted(map(str, parts))),
        )


def _saved(folder: Path) -> Table:
    import datasets

    check_file(folder / "dataset_info.json", CONFIG)
    state = read_json(folder / "state.json")
    for entry in [*_entries(state, "_data_files"), *_entries(state, "_indices_data_files")]:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise UnbackdoorError(f"{folder}/state.json must name files of the data set, got {printable(repr(entry))}.")
        check_file(folder / name)
    level, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(logging.CRITICAL)  # an error says what is wrong, once
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_from_disk(str(folder))
        table = loaded.with_format("arrow")[:]
        check_unfolded([table], sum(part.stat().st_size for part in folder.glob("*.arrow")), folder)
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
    names = {
        name: tuple(feature.names)
        for name, feature in loaded.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return Table(cells={name: table.column(name) for name in table.column_names}, names=names, folder=folder)


def _entries(state: dict[str, Any], name: str) -> list[Any]:
    entries = state.get(name)
    return entries if isinstance(entries, list) else []


def _image_folder(folder: Path, content: _Content, classes: Sequence[str] | None) -> Table:
    """Reads one folder of pictures per class.

    Names that are whole numbers are class indices; others are numbered in alphabetical order.
    """
    from unbackdoor._data.decoding import undecoded  # imports Pillow

    _report_undecoded(folder, content)
    pictures: dict[str, list[Path]] = defaultdict(list)
    for path in content.pictures:
        if len(path.parts) > 1:
            pictures[path.parts[0]].append(path)
    known = classes is not None and {alike(name) for name in pictures} <= {alike(name) for name in classes}
    if not known:
        _check_level(folder, pictures)
    numbers = {name: int(name) for name in pictures if name.isascii() and name.isdecimal()}
    if len(numbers) == len(pictures) and max(numbers.values()) < 100_000:  # class indices, some of which may be absent
        names = [str(number) for number in range(max(numbers.values()) + 1)]
        place, name = next(((at, name) for at, name in enumerate(sorted(pictures)) if numbers[name] != at), (0, ""))
        if classes is None and sorted(pictures, key=numbers.__getitem__) != sorted(pictures):
            logger.info(
                "%s: the names of its sub-folders are class numbers, so %s is class %d. If the model was trained by "
                "torchvision's ImageFolder, which counts names in alphabetical order, there it is class %d.",
                folder,
                name,
                numbers[name],
                place,
            )
    else:
        names = sorted(pictures)
        numbers = {name: number for number, name in enumerate(names)}
        empty = sorted(
            entry.name
            for entry in folder.iterdir()
            if entry.is_dir() and not _hidden(entry.name) and entry.name not in pictures
        )
        if empty and classes is None:
            raise UnbackdoorError(
                f"{folder} has no pictures in {empty[0]}, and without the class names of a model it is not known "
                "whether that is a class. Remove the folder if it is not one; else name the folders by the numbers of "
                "their classes."
            )
    left = [path for path in content.pictures if len(path.parts) == 1]
    left += content.tables
    left += [path for path in content.others if len(path.parts) > 1 and not undecoded(path)]
    if left:
        logger.info(
            "%s: %s files that are not pictures of a class are ignored, such as %s.", folder, f"{len(left):,}", left[0]
        )
    rows = [(str(path), numbers[name]) for name in sorted(numbers, key=numbers.__getitem__) for path in pictures[name]]
    cells = {"image": [path for path, _ in rows], "label": [number for _, number in rows]}
    return Table(cells=cells, names={"label": tuple(names)}, folder=folder)


def _check_level(folder: Path, pictures: dict[str, list[Path]]) -> None:
    """Refuse sub-folders that are splits, or that hold the folders of the classes, instead of being classes."""
    deep = {name: sorted({path.parts[1] for path in paths}) for name, paths in pictures.items()}
    deep = {name: inside for name, inside in deep.items() if all(len(path.parts) > 2 for path in pictures[name])}
    splits = {name: split for name in pictures if (split := _split_of(name))}
    whole = {split for name, split in splits.items() if re.sub("[^a-z]", "", name.casefold()) in _SPLITS}
    if (
        splits.keys() & deep.keys()
        or len(whole) > 1
        or (len(splits) == len(pictures) and (whole or len(set(splits.values())) > 1))
    ):
        raise _refused_several(folder, list(splits), "splits", max(splits))
    if len(pictures) > 1 and len(deep) == len(pictures) and len({*itertools.chain(*deep.values())}) == 1:
        return  # class/images/, as of Tiny ImageNet
    counts = Counter(name for inside in deep.values() for name in inside)
    shared = sorted(name for name, count in counts.items() if count > 1)
    outer, holder = sorted(deep)[:5], folder / min(deep, default="")
    if len(pictures) == 1:  # one folder in another, perhaps several times
        paths = next(iter(pictures.values()))
        only = Path(os.path.commonpath([path.parent for path in paths]))
        level = len(only.parts)
        inner = {path.parts[level] for path in paths if len(path.parts) > level + 1}
        shared = sorted(inner) if all(len(path.parts) > level + 1 for path in paths) else []
        outer, holder = [str(only)], folder / only
    if len(deep) == len(pictures) and shared:
        raise UnbackdoorError(
            f"{folder} has sub-folders ({', '.join(outer)}) with folders of their own ({', '.join(shared[:3])}, ...), "
            f"so it is not clear which are the classes. Name the folder that holds them, as in {holder}."
        )
