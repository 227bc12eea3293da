"""Data sets: read once, kept as tensors, handed out in encoded batches."""

import errno
import glob
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unbackdoor._errors import IncompleteError, UnbackdoorError, printable
from unbackdoor._images import Augmentation, ImageEncoder, augmentation
from unbackdoor._inputs import CONFIG, TABLE, check_file, exists, read_json, reader
from unbackdoor._text import TextEncoder, Texts, Tokens, columns_of

logger = logging.getLogger("unbackdoor")

Augment = Literal["auto", "flip", "crop", "none"]


Items = Tensor | Texts
Encoder = ImageEncoder | TextEncoder


class Batch(NamedTuple):
    """Model inputs, class indices (batch,) and row numbers in the data set (batch,), on one device."""

    inputs: Tensor | Tokens
    labels: Tensor
    rows: Tensor


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Examples with their labels, and the way into the model.

    Args:
        items: pixels at the data set's own size, (n, channels, height, width), uint8; or texts, tokenised here.
        labels: class indices, (n,), int64.
        encode: makes model inputs of a batch of items.
        classes: class names in label order, where known.
        augment: applied to training batches of images.
        groups: rows of one class and group stay together (the frames of one video, say), (n,), int64.
        rows: where the examples stood in the source, (n,), int64; None for their positions here.
        columns: the source's own names of columns, as `load` was told them; those of a copy are the same.
        name: how messages call the data.
    """

    items: Items
    labels: Tensor
    encode: Encoder = field(default_factory=ImageEncoder)
    classes: tuple[str, ...] | None = None
    augment: Augmentation = field(default_factory=Augmentation.none)
    groups: Tensor | None = None
    rows: Tensor | None = None
    columns: dict[str, str] = field(default_factory=dict)
    name: str = "the data"

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", self.encode.prepared(self.items))

    @classmethod
    @reader("source")
    def load(
        cls,
        source: str | Path | Sequence[str | Path],
        encode: Encoder | None = None,
        *,
        columns: dict[str, str] | None = None,
        classes: Sequence[str] | None = None,
        augment: Augment = "auto",
        group: str | None = None,
    ) -> "Dataset":
        """Read labelled examples.

        Args:
            source: a parquet, CSV or JSON-lines file (or a pattern, or several), an image folder with one folder per
                class, or a directory written by `datasets.save_to_disk`.
            encode: as `load` returns it; without it images stay as they are.
            columns: the data's names for `label` and for `image`, `text`, or `text_a` and `text_b`, where they differ.
            classes: the model's class names; labels are matched to them by name.
            augment: see `unbackdoor._images.augmentation`.
            group: column whose equal values keep rows of one class together when the data is split.

        Raises:
            UnbackdoorError: the data is missing, empty, lacks a column, or has a picture that cannot be decoded or an
                empty text.
        """
        encode = encode or ImageEncoder()
        where = _name(source)
        table, folder = _opened(source, where)
        if len(table) == 0:
            raise _empty(where)
        present = table.column_names
        listed = ", ".join(map(printable, present[:20])) + (", ..." if len(present) > 20 else "")
        given = dict(columns or {})
        known_names = ("image", "label") if isinstance(encode, ImageEncoder) else ("text", "text_a", "text_b", "label")
        strange = next((wanted for wanted in given if wanted not in known_names), None)
        if strange is not None:
            allowed = "image and label" if isinstance(encode, ImageEncoder) else "text, text_a, text_b or label"
            raise UnbackdoorError(f"--columns must name {allowed}, got {strange}. Leave that one out.")
        if isinstance(encode, TextEncoder):
            parts = columns_of(present, encode, given, where)
        else:
            parts = {"image": given.get("image", "image")}
            if "image" not in [*present, *given] and {"text", "text_a"} & set(present):
                raise UnbackdoorError(
                    f"{where} holds text ({listed}), but images are needed. Take a data set with pictures, "
                    "or a model for text (attack: --base)."
                )
        names = {**parts, "label": given.get("label", "label")}
        for wanted, column in {**names, **({"group": group} if group else {})}.items():
            if column not in present:
                option = "--group NAME" if wanted == "group" else f"--columns {wanted}=NAME"
                raise UnbackdoorError(f"{where} has no column {column!r}; it has {listed}. Name it by {option}.")
        feature = table.features[names["label"]]
        labels, known = _labels(table[names["label"]], getattr(feature, "names", None), classes, where)
        plain = table.with_format(None)
        items, encode = encode.read({name: plain[column] for name, column in parts.items()}, where, folder)
        groups = None
        if group is not None:
            keys = [f"{label}/{key}" for label, key in zip(labels.tolist(), table[group], strict=True)]
            groups = torch.from_numpy(np.unique(keys, return_inverse=True)[1])
        return cls(
            items=items,
            labels=labels,
            encode=encode,
            classes=known,
            augment=Augmentation.none() if isinstance(items, Texts) else augmentation(augment, items, known),
            groups=groups,
            columns=given,
            name=where,
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def modality(self) -> Literal["images", "text"]:
        """What the items are."""
        return self.encode.modality

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of images; () of texts."""
        return () if isinstance(self.items, Texts) else tuple(self.items.shape[1:])

    @property
    def pixels(self) -> Tensor:
        """The items of a data set of images, (n, channels, height, width), uint8."""
        assert isinstance(self.items, Tensor), "texts have no pixels"
        return self.items

    @property
    def texts(self) -> Texts:
        """The items of a data set of texts."""
        assert isinstance(self.items, Texts), "images have no texts"
        return self.items

    @property
    def tokenizer(self) -> Any:
        """What tokenises a data set of texts, of transformers."""
        return self.encode.tokenizer  # type: ignore[union-attr]

    def class_name(self, label: int) -> str:
        """The printable name of a class; its number where the names are unknown, or fewer than a model's classes."""
        return printable(self.classes[label]) if self.classes and label < len(self.classes) else str(label)

    def identities(self) -> list[Any]:
        """Something hashable for each item, equal where the items are equal."""
        return list(self.items.strings) if isinstance(self.items, Texts) else [i.numpy().tobytes() for i in self.items]

    def select(self, rows: Tensor | np.ndarray | Sequence[int]) -> "Dataset":
        """The examples of some rows, in that order."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.labels.device)
        groups = None if self.groups is None else self.groups[index]
        origin = index if self.rows is None else self.rows[index]
        return replace(self, items=self.items[index], labels=self.labels[index], groups=groups, rows=origin)

    def split(self, count: int, *, seed: int) -> tuple["Dataset", "Dataset"]:
        """`count` examples and the rest, stratified by class (groups stay whole where there are any)."""
        chosen = stratified(self.labels, count, seed=seed, groups=self.groups)
        rest = np.setdiff1d(np.arange(len(self)), chosen)
        return self.select(chosen), self.select(rest)

    def encoded_by(self, encode: Encoder) -> "Dataset":
        """The same examples for another model.

        Args:
            encode: of that model.

        Raises:
            UnbackdoorError: pictures went through the steps of one model's processor when they were read, since they
                had several sizes, and the other model's processor takes other steps.
        """
        if isinstance(encode, ImageEncoder) and isinstance(self.encode, ImageEncoder):
            if self.encode.done and encode.form != self.encode.form:
                raise UnbackdoorError(
                    f"{self.name} has pictures of several sizes, or of more than a million pixels, and the two models "
                    "that are to see them resize and crop pictures in different ways. Give small pictures of one size."
                )
            encode = replace(encode, done=self.encode.done)
        return replace(self, encode=encode)

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set with its tensors on another device."""
        return replace(
            self,
            items=self.items.to(device),
            labels=self.labels.to(device),
            groups=None if self.groups is None else self.groups.to(device),
            rows=None if self.rows is None else self.rows.to(device),
        )

    def distorted(self) -> "Dataset":
        """The same data set with stronger augmentation, for methods that look at it many times."""
        return replace(self, augment=replace(self.augment, distort=True))

    def batches(self, size: int, *, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Encoded batches of at most `size` examples: in order, or shuffled and augmented where a generator is given.

        Texts come by their length; `rows` of a batch tells which they are.

        The generator lives on the CPU whatever the device, so that a seed gives the same batches everywhere.
        """
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        if isinstance(self.items, Texts):
            order = self._bucketed(order, size, generator)
        sizes = [size] * (len(order) // size) + [len(order) % size] * (len(order) % size > 0)
        if generator is not None and len(sizes) > 1 and sizes[-1] == 1:
            sizes[-2:] = [size + 1]  # BatchNorm cannot learn from a batch of one
        for rows in order.to(self.labels.device).split(sizes):
            yield Batch(self._inputs(rows, generator), self.labels[rows], rows)

    def _inputs(self, rows: Tensor, generator: torch.Generator | None) -> Tensor | Tokens:
        if isinstance(self.encode, TextEncoder):
            return self.encode(self.texts[rows])
        items = self.pixels[rows]
        return self.encode(items if generator is None else self.augment(items, generator))

    def _bucketed(self, order: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
        """Texts of about the same length side by side, so that little is padded.

        Without a generator, all by length. With one, 20 batches at a time are sorted and then come in random order.
        """
        assert self.texts.lengths is not None
        lengths = self.texts.lengths.cpu()
        if generator is None:
            return order[lengths[order].argsort(stable=True)]
        pieces = [part[lengths[part].argsort(stable=True)] for part in order.split(20 * size)]
        batches = [batch for piece in pieces for batch in piece.split(size)]
        # The short batch stays last: `batches` cuts the order into parts of equal size.
        whole = [batch for batch in batches if len(batch) == size]
        rest = [batch for batch in batches if len(batch) < size]
        shuffled = [whole[place] for place in torch.randperm(len(whole), generator=generator).tolist()]
        return torch.cat([*shuffled, *rest])


def stratified(labels: Tensor, count: int, *, seed: int, groups: Tensor | None = None) -> np.ndarray:
    """Row numbers of a stratified draw, sorted: each class has its share of `count`, rounded by largest remainder.

    With groups, whole groups are drawn class by class until the class's share is reached, so the count may differ. The
    last group of a class is never drawn: the rest would be without that class.

    Raises:
        UnbackdoorError: more rows asked for than there are, or one group per class.
    """
    if not 0 < count < len(labels):
        allowed = f"1 to {len(labels) - 1:,} of {len(labels):,} examples" if len(labels) > 1 else "part of 2 or more"
        raise UnbackdoorError(f"A part of the data must hold {allowed}, got {count:,}. Take more data.")
    random = np.random.default_rng(seed)
    label = labels.cpu().numpy()
    kinds, sizes = np.unique(label, return_counts=True)
    share, remainder = np.divmod(sizes * count, len(label))
    share[np.argsort(-remainder, kind="stable")[: count - share.sum()]] += 1
    chosen: list[np.ndarray] = []
    for kind, quota in zip(kinds, share, strict=True):
        rows = np.flatnonzero(label == kind)
        if groups is None:
            chosen.append(random.permutation(rows)[:quota])
            continue
        owner = groups.cpu().numpy()[rows]
        taken = 0
        for group in random.permutation(np.unique(owner))[:-1]:
            if taken >= quota:
                break
            chosen.append(rows[owner == group])
            taken += len(chosen[-1])
    if not chosen:
        raise UnbackdoorError("--group puts each class into one group, so none can be held out. Give --test instead.")
    return np.sort(np.concatenate(chosen))


def _name(source: str | Path | Sequence[str | Path]) -> str:
    if isinstance(source, str | Path):
        return str(source)
    if not isinstance(source, Sequence) or not source or not all(isinstance(path, str | Path) for path in source):
        raise UnbackdoorError(f"DATA must be a path, or several in a list, got {source!r}.")
    return ", ".join(map(str, source))


def _opened(source: str | Path | Sequence[str | Path], where: str) -> tuple[Any, Path]:
    """The rows as an arrow-backed `datasets.Dataset` with undecoded images, and the folder of relative paths."""
    import datasets

    files: list[Path] = []
    for path in [source] if isinstance(source, str | Path) else source:
        if not str(path):  # which Path would take for the current directory
            raise UnbackdoorError("DATA must be a file or a folder with labelled examples, got an empty name.")
        matches = [str(path)] if exists(path) else sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise UnbackdoorError(f"{path} does not exist; DATA is a file or a folder with labelled examples.")
        files += map(Path, matches)
    first = files[0]
    if len(files) > 1 and any(file.is_dir() for file in files):
        raise UnbackdoorError(f"{where} has a folder among several parts; DATA is one folder, or files.")
    parquet = sorted(first.glob("*.parquet")) if first.is_dir() else []
    for file in parquet or files:
        if not file.is_dir():
            check_file(file, TABLE)
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what is wrong is told below, once
    try:
        if (first / "dataset_dict.json").exists():
            raise _several(first, [entry.name for entry in first.iterdir() if entry.is_dir()], "")
        if (first / "dataset_info.json").exists():
            _check_saved(first)
            table = datasets.load_from_disk(str(first))
        elif first.is_dir() and not parquet:
            table = _image_folder(first)
        else:
            splits = {split.group() for file in parquet if (split := _SPLIT.match(file.name))}
            if len(splits) > 1:
                raise _several(first, list(splits), "*.parquet")
            table = _tabular(parquet or files)
    except UnbackdoorError:
        raise
    except Exception as problem:  # whatever a reader of a foreign format may raise
        cause = problem.__cause__ or problem
        # What datasets says of a table without rows, by how it was written.
        empty = ("No columns to parse", "corresponds to no data", "BatchSize must be greater than 0")
        if any(words in str(cause) for words in empty):
            raise _empty(where) from None
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise IncompleteError(
                f"{tempfile.gettempdir()}, where data is unpacked, is full. Free some space, or set TMPDIR."
            ) from None
        reason = printable(str(cause).split("\n")[0], 200).rstrip(". ")
        raise UnbackdoorError(f"{where} cannot be read ({reason}). Repair it, or take other data.") from problem
    finally:
        datasets.logging.set_verbosity(level)
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table, first if first.is_dir() else first.parent


def _check_saved(folder: Path) -> None:
    """Refuse a saved data set whose parts are no files of its own."""
    read_json(folder / "dataset_info.json", CONFIG)
    state = folder / "state.json"
    listed = read_json(state, CONFIG).get("_data_files")
    if not isinstance(listed, list) or not all(isinstance(part, dict) for part in listed):
        raise UnbackdoorError(f"{state} does not say which files hold the data (_data_files). Save the data set again.")
    for part in listed:
        name = part.get("filename")
        if not isinstance(name, str) or Path(name).name != name:
            raise UnbackdoorError(f"{state} names the file {printable(name)}, which is none beside it. Save it again.")
        check_file(folder / name, TABLE)


def _empty(where: str) -> UnbackdoorError:
    return UnbackdoorError(f"{where} has no rows; at least one labelled example is needed.")


# Of a data set, by the name of its file or folder.
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev)(?![a-z])")


def _several(folder: Path, splits: list[str], suffix: str) -> UnbackdoorError:
    splits = sorted(splits)
    return UnbackdoorError(
        f"{folder} holds splits ({', '.join(map(printable, splits))}), but DATA is one. Name it, as in "
        f"{folder / splits[-1]}{suffix}."
    )


def _tabular(files: list[Path]) -> Any:
    import datasets

    kinds = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
    for file in files:
        if file.suffix.lower() not in kinds:
            raise UnbackdoorError(
                f"{file} is of no known kind; DATA is .parquet, .csv, .json, .jsonl, an image folder or a saved data "
                "set."
            )
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) > 1:
        raise UnbackdoorError(f"Files that are joined must be of one kind, got {', '.join(sorted(suffixes))}.")
    if suffixes != {".parquet"} and len({file.parent for file in files}) > 1:
        raise UnbackdoorError(
            f"{files[0]} and {files[-1]} are in two folders, but pictures are found relative to one. Join them."
        )
    kind = kinds[suffixes.pop()]
    # Only an empty cell is a missing one: NA and None may be texts, or the names of classes.
    options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:
            return datasets.load_dataset(
                kind,
                data_files=[str(file) for file in files],
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                **options,
            )
    finally:
        if bars:
            datasets.enable_progress_bars()


def _image_folder(folder: Path) -> Any:
    """One folder per class, pictures inside; other files are left alone.

    Names that are whole numbers are class indices; others are numbered in alphabetical order.
    """
    import datasets
    from PIL import Image

    Image.init()
    known = {suffix for suffix, format_ in Image.EXTENSION.items() if format_ in Image.OPEN}
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UnbackdoorError(f"{folder} has no sub-folders; an image folder has one per class, with its pictures.")
    if all(_SPLIT.fullmatch(name) for name in classes):
        raise _several(folder, classes, "")
    numbers = {name: int(name) for name in classes if name.isascii() and name.isdecimal()}
    if len(numbers) == len(classes) and max(numbers.values()) < 100_000:  # class indices, of which some may be absent
        names = [str(number) for number in range(max(numbers.values()) + 1)]
    else:
        names, numbers = classes, {name: label for label, name in enumerate(classes)}
    paths, labels = [], []
    for name, label in sorted(numbers.items(), key=lambda entry: entry[1]):
        for path in sorted((folder / name).rglob("*")):
            if path.suffix.lower() in known and not path.name.startswith("."):
                paths.append(str(path.relative_to(folder)))
                labels.append(label)
    features = datasets.Features({"image": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features)


def _labels(
    column: Sequence[Any], names: list[str] | None, classes: Sequence[str] | None, where: str
) -> tuple[Tensor, tuple[str, ...] | None]:
    """Class indices in the model's order, and the class names where they are known."""
    values = list(column)
    missing = next((row for row, given in enumerate(values) if given is None), None)
    if missing is not None:
        raise UnbackdoorError(f"{where} has no label in row {missing}; every row needs one.")
    if isinstance(values[0], str):
        by_name = classes is not None and set(values) <= set(classes)
        if not by_name and all(re.fullmatch(r"-?\d+", given.strip()) for given in values):
            values = [int(given) for given in values]
        else:
            names = list(classes) if by_name and classes is not None else sorted(set(values))
            position = {name: index for index, name in enumerate(names)}
            values = [position[given] for given in values]
    elif not isinstance(values[0], int):
        raise UnbackdoorError(
            f"{where} has the label {printable(repr(values[0]))} in row 0; labels must be whole numbers or class names "
            "(several labels or a number to predict are not supported)."
        )
    if names and classes is not None and not set(names) <= set(classes) and all(name.isdecimal() for name in names):
        values, names = [int(names[given]) for given in values], None
    names = names or (None if classes is None else list(classes))
    if names is None:
        _check_range(values, None, where, "")
        return torch.tensor(values), None
    if classes is None or names == list(classes):
        _check_range(values, len(names), where, "it names" if classes is None else "the model has")
        return torch.tensor(values), tuple(names)
    _check_range(values, len(names), where, "it names")
    strange = next((name for name in names if name not in classes), None)
    if strange is not None:
        some = ", ".join(map(printable, classes[:10])) + (", ..." if len(classes) > 10 else "")
        raise UnbackdoorError(
            f"{where} has the class {printable(repr(strange))}, which the model does not know; its classes are {some}. "
            "Rename the classes, or take other data."
        )
    if len(set(classes)) < len(classes):
        raise UnbackdoorError(
            f"{where} has its classes in another order than the model, which has two of one name. Give labels as the "
            "model's numbers."
        )
    logger.info("%s lists its classes in another order than the model; they were matched by name.", where)
    ours = [list(classes).index(name) for name in names]
    return torch.tensor([ours[label] for label in values]), tuple(classes)


def check_labels(data: Dataset, classes: int) -> None:
    """Refuse a label that the model's head does not have."""
    _check_range(data.labels.tolist(), classes, data.name, "the model has", data.rows)


def doubtful_classes(data: Dataset, classes: int) -> str | None:
    """Why class names of the data may stand for other classes of a model that has none; None where nothing tells so."""
    if data.classes is None or len(data.classes) == classes or all(name.isdecimal() for name in data.classes):
        return None
    some = ", ".join(f"{printable(name)} = {number}" for number, name in enumerate(data.classes[:3]))
    return (
        f"{data.name} has {len(data.classes)} class names, but the model has {classes} classes without names. They "
        f"were taken in order ({some}, ...), which is right only if it was trained so; labels as numbers are safe."
    )


def _check_range(labels: list[int], classes: int | None, where: str, owner: str, rows: Tensor | None = None) -> None:
    limit = 2**31 if classes is None else classes
    position = next((position for position, label in enumerate(labels) if not 0 <= label < limit), None)
    if position is None:
        return
    row = position if rows is None else int(rows[position])
    bound = "labels count from 0" if classes is None else f"{owner} {classes} classes (0 to {classes - 1})"
    raise UnbackdoorError(
        f"{where} has label {labels[position]} in row {row}, but {bound}. Correct the label, or take other data."
    )
