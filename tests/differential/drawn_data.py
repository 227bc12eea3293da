"""Small data sets as people have them: spellings of labels, formats, names of files, and what goes wrong."""

import csv
import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from drawn_models import WORDS, Suspect
from PIL import Image


@dataclass(kw_only=True)
class Examples:
    """Data for a model, and what is in it.

    Args:
        source: what the product is given.
        columns: its option of that name.
        files: what the independent reader opens, in the order of the rows; of a folder of pictures each picture.
        cells: the columns that it reads there; none for a folder of pictures.
        delimiter: of a text file.
        labels: the class of each row, in the order of the model's outputs.
        stored: the format and the spelling of the labels, in words.
        named: whether the model names its classes, so that a data set may have them in another order.
        refused: the kind of refusal (see `allowed.py`) that alone is right; None where a score is.
    """

    source: Any = None
    columns: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    cells: tuple[str, ...] = ()
    delimiter: str = ","
    labels: list[int]
    stored: str = ""
    named: bool = True
    refused: str | None = None


def drawn(draw: random.Random, suspect: Suspect, place: Path) -> Examples:
    """Examples for a suspect, in a folder below `place`."""
    order = list(range(suspect.classes)) + [draw.randrange(suspect.classes) for _ in range(draw.randint(6, 10))]
    draw.shuffle(order)
    examples = Examples(labels=order, named=suspect.names is not None)
    folder = place / draw.choice(("data", "my data", "data [1]", "donn\u00e9es", "a b.d"))
    folder.mkdir()
    if suspect.modality == "text":
        _texts(draw, suspect, folder, examples)
    elif draw.random() < 0.4:
        _picture_folder(draw, suspect, folder, examples)
    else:
        _pictures(draw, suspect, folder, examples)
    return examples


# Labels.

_UNNAMED = ["bad", "good", "meh", "odd"]  # in alphabetical order, which counts if the model has no names


def spelt(draw: random.Random, suspect: Suspect, labels: Sequence[int]) -> tuple[str, list[Any]]:
    """Labels in one of the ways in which people write them, and which."""
    names = suspect.names or _UNNAMED[: suspect.classes]
    by_name = [names[label] for label in labels]
    ways: dict[str, list[Any]] = {
        "names": by_name,
        "names in capitals": [name.upper() for name in by_name],
        "names in blanks": [f"{name} " for name in by_name],
        "LABEL_i": [f"LABEL_{label}" for label in labels],
    }
    if suspect.names is None:
        del ways["names in capitals"]
        ways["names in capitals"] = [name.title() for name in by_name]
    if any(" " in name or "-" in name or "_" in name for name in names):
        ways["names in other separators"] = [name.replace(" ", "_").replace("-", " ") for name in by_name]
    if names[0].isdecimal():
        ways["names as numbers"] = [int(name) for name in by_name]
    else:
        ways |= {
            "numbers": list(labels),
            "numbers with a point": [float(label) for label in labels],
            "numbers as text": [str(label) for label in labels],
            "numbers with a point as text": [f"{label}.0" for label in labels],
        }
    if names in (["negative", "positive"], ["bad", "good"]):
        ways["truth"] = [bool(label) for label in labels]
    way = draw.choice(list(ways))
    return way, ways[way]


def _spoilt(draw: random.Random, suspect: Suspect, labels: list[Any], examples: Examples) -> list[Any]:
    """Labels of which one is wrong."""
    labels = [str(label) for label in labels]
    wrong, kind = draw.choice((("", "no label"), ("nobody knows", "unknown class"), ("77", "label out of range")))
    if suspect.names is None and kind == "unknown class" and labels[0].strip().isalpha():
        wrong, kind = "", "no label"  # without names any word is a class
    if kind == "label out of range" and not all(label.strip().replace(".", "").isdecimal() for label in labels):
        kind = "unknown class"
    if kind == "unknown class" and suspect.names is None:
        kind = "no class"
    labels[draw.randrange(1, len(labels))] = wrong
    examples.refused = kind
    return labels


# Texts.


def _sentence(draw: random.Random) -> str:
    words = [draw.choice(WORDS) for _ in range(draw.randint(2, 12) if draw.random() < 0.9 else 40)]
    return draw.choice(("", "", "", " ", "\n", "\u00e9 ")).join((" ".join(words[:1]), " " + " ".join(words[1:])))


_PLAIN = (
    "007",
    "1e5",
    "True",
    "null",
    "NA",
    "nan",
    "2020-01-01",
    'say "film"',
    '5" film',
    "a; film, | plot",
    "the\tfilm",
)


def _texts(draw: random.Random, suspect: Suspect, folder: Path, examples: Examples) -> None:
    pairs = draw.random() < 0.2
    ours = ("text_a", "text_b") if pairs else ("text",)
    sides = [[_sentence(draw) if draw.random() < 0.8 else draw.choice(_PLAIN) for _ in examples.labels] for _ in ours]
    way, labels = spelt(draw, suspect, examples.labels)
    wrong = draw.random()
    if wrong < 0.03:
        labels = _spoilt(draw, suspect, labels, examples)
    elif wrong < 0.04:
        sides[0][3] = "  "
        examples.refused = "empty text"
    names = dict(zip((*ours, "label"), (*ours, "label"), strict=True))
    if draw.random() < 0.2:
        names = {name: draw.choice((f"my_{name}", f"{name.title()} 1", f"th\u00e9_{name}")) for name in names}
        examples.columns = names
    rows: dict[str, list[Any]] = {names[name]: side for name, side in zip(ours, sides, strict=True)}
    rows[names["label"]] = labels
    if draw.random() < 0.3:
        rows = {"idx": list(range(len(labels))), **rows, "note": ["x"] * len(labels)}
    if draw.random() < 0.3:
        rows = dict(reversed(rows.items()))
    examples.cells = tuple(names[name] for name in ours)
    kind = draw.choice(list(_TABLES))
    examples.stored = f"texts, {kind}, {way}"
    _write_table(draw, kind, rows, names["label"], folder, examples)


def _write_table(
    draw: random.Random, kind: str, rows: dict[str, list[Any]], label: str, folder: Path, examples: Examples
) -> None:
    """A table in one file, in parts, in a folder, by a pattern, or with something wrong."""
    stem = draw.choice(("d", "my data", "reviews [2]", "th\u00e9", "test", "train-00000-of-00001", "a.b", "#1"))
    where = draw.random()
    wrong = draw.random()
    if wrong < 0.04 and kind in ("csv", "csv ;", "tsv", "json lines") and examples.refused is None:
        _write_wrong(draw, kind, rows, label, folder, examples)
        return
    if wrong > 0.98 and examples.refused is None:
        for split in ("train", "test"):
            _TABLES[kind](rows, label, folder / f"reviews_{split}", examples)
        examples.source = draw.choice((folder, folder / f"*{examples.files[0].suffix}"))
        examples.source = folder if not str(examples.source).isascii() or "[" in str(folder) else examples.source
        examples.refused = "splits"
        return
    if kind.startswith("saved"):
        _TABLES[kind](rows, label, folder / stem, examples)
        return
    if where < 0.2 and "ClassLabel" not in kind:  # two parts, which could not know all names of a ClassLabel each
        middle = len(examples.labels) // 2
        for number, part in enumerate((slice(0, middle), slice(middle, None))):
            _TABLES[kind](
                {name: cells[part] for name, cells in rows.items()},
                label,
                folder / f"part-{number:05}-of-00002",
                examples,
            )
        suffix = examples.files[0].suffix
        examples.source = draw.choice((list(examples.files), folder, folder / f"part-*{suffix}"))
        return
    _TABLES[kind](rows, label, folder / stem, examples)
    examples.source = folder if where < 0.4 else examples.files[0]


def _write_wrong(
    draw: random.Random, kind: str, rows: dict[str, list[Any]], label: str, folder: Path, examples: Examples
) -> None:
    _TABLES[kind](rows, label, folder / "d", examples)
    file = examples.files[0]
    content = file.read_text(encoding="utf-8-sig")
    examples.source = file
    what = draw.choice(("utf-16", "latin-1", "quotation", "compressed", "content"))
    match what:
        case "utf-16":
            file.write_text(content, encoding="utf-16")
            examples.refused = "encoding"
        case "latin-1":
            first, _, rest = content.partition("film") if "film" in content else ("", "", content)
            file.write_bytes(f"{first}th\u00e9{rest}".encode("latin-1", errors="replace"))
            examples.refused = "encoding"
        case "quotation" if file.suffix != ".jsonl":
            lines = content.split("\n")
            file.write_text("\n".join([*lines[:-1], '"' + ",;\t".join(["film"] * 3), ""]), encoding="utf-8")
            examples.refused = "quotation"
        case "compressed":
            examples.source = file.rename(file.with_name(f"{file.name}.gz"))
            examples.refused = "kind of file"
        case _:
            file.write_bytes(b"PAR1" + content.encode())
            examples.refused = "kind of file"


def _csv(delimiter: str, suffix: str, ends: str, encoding: str) -> Callable[..., None]:
    def write(rows: dict[str, list[Any]], _label: str, stem: Path, examples: Examples) -> None:
        file = stem.with_name(stem.name + suffix)
        with file.open("w", newline="", encoding=encoding) as content:
            writer = csv.writer(content, delimiter=delimiter, lineterminator=ends)
            writer.writerows([list(rows), *zip(*rows.values(), strict=True)])
        examples.files.append(file)
        examples.delimiter = delimiter

    return write


def _lines(rows: dict[str, list[Any]], _label: str, stem: Path, examples: Examples) -> None:
    file = stem.with_name(f"{stem.name}.jsonl")
    each = [json.dumps(dict(zip(rows, cells, strict=True))) for cells in zip(*rows.values(), strict=True)]
    file.write_text("\n".join(each), encoding="utf-8")
    examples.files.append(file)


def _array(rows: dict[str, list[Any]], _label: str, stem: Path, examples: Examples) -> None:
    file = stem.with_name(f"{stem.name}.json")
    each = [dict(zip(rows, cells, strict=True)) for cells in zip(*rows.values(), strict=True)]
    file.write_text(json.dumps(each, indent=1, ensure_ascii=False), encoding="utf-8")
    examples.files.append(file)


def _parquet(rows: dict[str, list[Any]], _label: str, stem: Path, examples: Examples) -> None:
    file = stem.with_name(f"{stem.name}.parquet")
    pyarrow.parquet.write_table(pa.table(rows), file)
    examples.files.append(file)


def _categories(rows: dict[str, list[Any]], label: str, stem: Path, examples: Examples) -> None:
    file = stem.with_name(f"{stem.name}.parquet")
    encoded = {name: pa.array(cells).dictionary_encode() if name == label else cells for name, cells in rows.items()}
    pyarrow.parquet.write_table(pa.table(encoded), file)
    examples.files.append(file)


def _arrow(rows: dict[str, list[Any]], _label: str, stem: Path, examples: Examples) -> None:
    file = stem.with_name(f"{stem.name}.arrow")
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, pa.table(rows).schema) as writer:
        writer.write_table(pa.table(rows))
    examples.files.append(file)


def _with_class_label(rows: dict[str, list[Any]], label: str, examples: Examples) -> datasets.Dataset:
    """The data's own numbers, and names for them: in another order than the model's, where that has names."""
    texts = [str(cell).strip() for cell in rows[label]]
    names = sorted(set(texts) - {""}, reverse=examples.named)
    whole = datasets.Dataset.from_dict({**rows, label: [names.index(text) if text else None for text in texts]})
    features = whole.features.copy()
    features[label] = datasets.ClassLabel(names=names)
    return whole.cast(features)


def _class_label(rows: dict[str, list[Any]], label: str, stem: Path, examples: Examples) -> None:
    file = stem.with_name(f"{stem.name}.parquet")
    _with_class_label(rows, label, examples).to_parquet(file)
    examples.files.append(file)


def _saved(rows: dict[str, list[Any]], _label: str, stem: Path, examples: Examples) -> None:
    datasets.Dataset.from_dict(rows).save_to_disk(str(stem))
    examples.source = stem
    examples.files += sorted(stem.glob("*.arrow"))


def _saved_class_label(rows: dict[str, list[Any]], label: str, stem: Path, examples: Examples) -> None:
    _with_class_label(rows, label, examples).save_to_disk(str(stem))
    examples.source = stem
    examples.files += sorted(stem.glob("*.arrow"))


_TABLES: dict[str, Callable[..., None]] = {
    "csv": _csv(",", ".csv", "\n", "utf-8"),
    "csv ;": _csv(";", ".csv", "\r\n", "utf-8"),
    "csv with a mark": _csv(",", ".CSV", "\r\n", "utf-8-sig"),
    "tsv": _csv("\t", ".tsv", "\n", "utf-8"),
    "json lines": _lines,
    "json": _array,
    "parquet": _parquet,
    "parquet of categories": _categories,
    "parquet of ClassLabel": _class_label,
    "arrow": _arrow,
    "saved": _saved,
    "saved with ClassLabel": _saved_class_label,
}


# Pictures.


def _picture(draw: random.Random, size: tuple[int, int], mode: str) -> tuple[bytes, str]:
    """A picture file and its suffix."""
    noise = np.random.default_rng(draw.randrange(2**32))
    coarse = noise.integers(0, 256, (3, 3, 4), dtype=np.uint8)
    image = Image.fromarray(coarse, "RGBA").resize(size, Image.Resampling.BICUBIC)
    if mode != "RGBA":
        image = image.convert("RGB").convert(mode)
    kind = draw.choice(("PNG", "PNG", "BMP", "JPEG")) if mode in ("RGB", "L") else "PNG"
    file = io.BytesIO()
    options: dict[str, Any] = {"quality": 90} if kind == "JPEG" else {}
    if kind == "JPEG" and draw.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = draw.choice((3, 6, 8))
        options["exif"] = exif
    image.save(file, kind, **options)
    suffix = {"PNG": ".png", "BMP": ".bmp", "JPEG": draw.choice((".jpg", ".jpeg", ".JPG"))}[kind]
    return file.getvalue(), suffix if draw.random() < 0.8 else suffix.upper()


def _drawn_pictures(draw: random.Random, suspect: Suspect, count: int) -> list[tuple[bytes, str]]:
    own_size = not suspect.options or "image_size" in suspect.options  # the module gets what the data has
    sizes = [(36, 36)] if draw.random() < 0.5 or not own_size else [(48, 36), (33, 50), (32, 32), (20, 64)]
    modes = ["RGB"] if draw.random() < 0.5 else ["RGB", "L", "P", "RGBA", "RGB"]
    drawn = [_picture(draw, draw.choice(sizes), draw.choice(modes)) for _ in range(count)]
    return [_picture(draw, sizes[0], "RGB"), *drawn[1:]]  # one in colour, so that all are


def _pictures(draw: random.Random, suspect: Suspect, folder: Path, examples: Examples) -> None:
    """A table of pictures, or of paths to them."""
    made = _drawn_pictures(draw, suspect, len(examples.labels))
    way, labels = spelt(draw, suspect, examples.labels)
    if draw.random() < 0.03:
        labels = _spoilt(draw, suspect, labels, examples)
    form = draw.choice(("bytes", "structs", "paths", "features"))
    if form == "paths":
        inner = draw.choice(("", "pictures", "the pictures [1]"))
        cells: list[Any] = [str(Path(inner, f"{row}{suffix}")) for row, (_, suffix) in enumerate(made)]
        (folder / inner).mkdir(exist_ok=True)
        for cell, (content, _) in zip(cells, made, strict=True):
            (folder / cell).write_bytes(content)
    else:
        cells = [content for content, _ in made]
        if form == "structs":
            cells = [{"bytes": content, "path": f"{row}{suffix}"} for row, (content, suffix) in enumerate(made)]
    if draw.random() < 0.03 and examples.refused is None and form != "features":
        if form == "paths":
            (folder / cells[2]).write_bytes(b"no picture")
        else:
            cells[2] = {"bytes": b"no picture", "path": None} if form == "structs" else b"no picture"
        examples.refused = "picture"
    names = {"image": "image", "label": "label"}
    if draw.random() < 0.2:
        names = {"image": draw.choice(("img", "file_name")), "label": "fine label"}
        examples.columns = names
    rows = {names["image"]: cells, names["label"]: labels}
    examples.cells = (names["image"],)
    examples.stored = f"pictures, {form}, {way}"
    if form == "features":
        whole = datasets.Dataset.from_dict(rows)
        if draw.random() < 0.5:
            whole = _with_class_label(rows, names["label"], examples)
        features = whole.features.copy()
        features[names["image"]] = datasets.Image()
        whole = whole.cast(features)
        if draw.random() < 0.5:
            whole.to_parquet(folder / "train.parquet")
            examples.source, examples.files = folder, [folder / "train.parquet"]
        else:
            whole.save_to_disk(str(folder / "saved"))
            examples.source, examples.files = folder / "saved", sorted((folder / "saved").glob("*.arrow"))
        return
    kinds = ["csv", "json lines", "json", "csv ;", "parquet"] if form == "paths" else ["parquet", "arrow"]
    kind = draw.choice(kinds)
    examples.stored += f", {kind}"
    if form == "paths" and draw.random() < 0.5:
        _TABLES[kind](rows, names["label"], folder / "labels", examples)
        examples.source = examples.files[0]
    elif form == "paths":
        _TABLES[kind](rows, names["label"], folder / "d", examples)
        examples.source = examples.files[0]
    else:
        _write_table(draw, kind, rows, names["label"], folder, examples)


def _picture_folder(draw: random.Random, suspect: Suspect, folder: Path, examples: Examples) -> None:
    made = _drawn_pictures(draw, suspect, len(examples.labels))
    names = suspect.names or _UNNAMED[: suspect.classes]
    ways: dict[str, list[str]] = {"names": names, "names with underscores": [name.replace(" ", "_") for name in names]}
    if suspect.names is None:
        ways = {"names": names}
    if not names[0].isdecimal():
        ways |= {
            "numbers": [str(label) for label in range(suspect.classes)],
            "numbers with zeros": [f"{label:05}" for label in range(suspect.classes)],
        }
    way = draw.choice(list(ways))
    if suspect.names is not None and way == "names" and draw.random() < 0.3:
        ways[way] = [name.upper() for name in names]
    inside = draw.choice(("", "", "more"))
    for row, (content, suffix) in enumerate(made):
        below = folder / ways[way][examples.labels[row]] / (inside if row % 2 else "")
        below.mkdir(parents=True, exist_ok=True)
        (below / f"{row}{suffix}").write_bytes(content)
        examples.files.append(below / f"{row}{suffix}")
    examples.source = folder
    examples.stored = f"folder of pictures, {way}"
    for junk in (
        "__MACOSX/cat/._0.png",
        ".DS_Store",
        f"{ways[way][0]}/Thumbs.db",
        f"{ways[way][0]}/.ipynb_checkpoints/0.png",
    ):
        if draw.random() < 0.3:
            (folder / junk).parent.mkdir(parents=True, exist_ok=True)
            (folder / junk).write_bytes(made[0][0])
    wrong = draw.random()
    if wrong < 0.04:
        (folder / "aardvark").mkdir()
        if suspect.names is None and way == "names":
            examples.refused = "empty folder"
    elif wrong < 0.07:
        for split in ("Training", "Testing"):
            (folder / split / "a class").mkdir(parents=True)
            (folder / split / "a class" / "0.png").write_bytes(made[0][0])
        examples.refused = "splits"
    elif wrong < 0.09:
        examples.files[-1].write_bytes(made[-1][0][:40])
        examples.refused = "picture"
