"""Data sets: read once, kept as tensors, handed out in encoded batches."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unbackdoor._data.images import Augmentation, ImageEncoder, augmentation
from unbackdoor._data.labels import alike, check_range, class_numbers, matched
from unbackdoor._data.reading import Table, opened
from unbackdoor._data.texts import TextEncoder, Texts, Tokens, columns_of
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import reader

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
            augment: see `unbackdoor._data.images.augmentation`.
            group: column whose equal values keep rows of one class together when the data is split.

        Raises:
            UnbackdoorError: the data is missing, empty, lacks a column, or has a picture that cannot be decoded or an
                empty text.
        """
        encode = encode or ImageEncoder()
        where = _name(source)
        given = dict(columns or {})
        known_names = ("image", "label") if isinstance(encode, ImageEncoder) else ("text", "text_a", "text_b", "label")
        strange = next((wanted for wanted in given if wanted not in known_names), None)
        if strange is not None:
            allowed = "image and label" if isinstance(encode, ImageEncoder) else "text, text_a, text_b or label"
            raise UnbackdoorError(f"--columns must name {allowed}, got {strange}. Leave that one out.")
        label = given.get("label", "label")
        tables = opened(source, where, label=label, classes=classes)
        present = [*tables[0].cells, *tables[0].twice] if tables else []
        if not tables or not any(len(cells) for table in tables for cells in table.cells.values()):
            raise UnbackdoorError(f"{where} has no rows; at least one labelled example is needed.")
        if isinstance(encode, TextEncoder):
            parts = columns_of(present, encode, given, where, tables[0].hint)
        else:
            parts = {"image": given.get("image", "image")}
            if "image" not in [*present, *given] and {"text", "text_a"} & set(present):
                raise UnbackdoorError(
                    f"{where} holds text ({_listed(present)}), but images are needed. Take a data set with pictures, "
                    "or a model for text (attack: --base)."
                )
        names = {**parts, "label": label}
        for wanted, column in {**names, **({"group": group} if group else {})}.items():
            _check_column(tables, wanted, column, where)
        stands_for = tables[0].names.get(label)
        if any(table.names.get(label) != stands_for for table in tables):
            raise UnbackdoorError(f"{where} has files that name their classes otherwise. Give them one by one.")
        labels, known = class_numbers(_joined(tables, label), stands_for, classes, where)
        _check_names_beside(tables, label, labels, known, where)
        cells: dict[str, Sequence[Any]] = {name: _joined(tables, column) for name, column in parts.items()}
        items, encode = encode.read(cells, where, tables[0].folder)
        groups = None
        if group is not None:
            keys = [f"{label}/{key}" for label, key in zip(labels.tolist(), _joined(tables, group), strict=True)]
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

    def brought(self) -> "Dataset":
        """The same pictures, resized and cropped for the model as those of a data set of several sizes are."""
        encode = self.encode
        if not isinstance(encode, ImageEncoder) or encode.done:
            return self
        return replace(self, items=encode.placed(self.pixels), encode=replace(encode, done=True))

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


def _joined(tables: Sequence[Table], column: str) -> list[Any]:
    return [cell for table in tables for cell in table.column(column)]


def _check_column(tables: Sequence[Table], wanted: str, column: str, where: str) -> None:
    """Refuse a column that a table has not, or has twice."""
    table = next((table for table in tables if column not in table.cells), None)
    if table is None:
        return
    if column in table.twice:
        raise UnbackdoorError(f"{where} has several columns of the name {column!r}. Rename all but one.")
    if column in tables[0].cells:
        raise UnbackdoorError(
            f"{where} has a file without the column {column!r} that the first one has; it has "
            f"{_listed(table.cells)}. Give files of one data set."
        )
    option = "--group NAME" if wanted == "group" else f"--columns {wanted}=NAME"
    raise UnbackdoorError(
        f"{where} has no column {column!r}; it has {_listed(table.cells)}. Name it by {option}{table.hint}."
    )


def _listed(columns: Iterable[str]) -> str:
    return printable(", ".join(columns), 300)


def _check_names_beside(
    tables: Sequence[Table], label: str, labels: Tensor, classes: Sequence[str] | None, where: str
) -> None:
    """Refuse numbers as labels whose names, in a column beside them, are those of other classes of the model."""
    beside = next((name for name in ("label_text", "label_name") if all(name in table.cells for table in tables)), None)
    if beside is None or beside == label or classes is None:
        return
    by_name = {alike(name): number for number, name in enumerate(classes)}
    for row, (number, name) in enumerate(zip(labels.tolist(), _joined(tables, beside), strict=True)):
        meant = by_name.get(alike(name)) if isinstance(name, str) else None
        if meant is not None and meant != number:
            raise UnbackdoorError(
                f"{where} has class {number} in row {row}, which it calls {name!r} in {beside}, but the model's class "
                f"{number} is {classes[number]!r}. Take the names, by --columns label={beside}."
            )


def check_labels(data: Dataset, classes: int) -> None:
    """Refuse a label that the model's head does not have."""
    check_range(
        data.labels.tolist(), classes, data.name, "the model has", None if data.rows is None else data.rows.tolist()
    )


def in_order_of(data: Dataset, classes: Sequence[str] | None) -> Dataset:
    """The same examples with the class numbers of a model, matched by name where the data names its classes.

    Raises:
        UnbackdoorError: the model does not know a class of the data.
    """
    if classes is None or data.classes is None or data.classes == tuple(classes):
        return data
    named = {number: data.classes[number] for number in data.labels.unique().tolist() if number < len(data.classes)}
    meaning = matched({name: number for number, name in named.items()}, classes, data.name)
    number_of = {number: meaning[name] for number, name in named.items()}
    labels = [number_of.get(number, number) for number in data.labels.tolist()]
    return replace(data, labels=torch.tensor(labels, device=data.labels.device), classes=tuple(classes))


def tell_order(
    data: Dataset, known: Sequence[str] | None, classes: int, warn: Callable[[str], None] = logger.warning
) -> None:
    """Say in which order names of the data were taken for the classes of a model that names none, and warn in doubt.

    Args:
        data: with names of its own or none.
        known: the names of the model's classes; nothing is said where there are any.
        classes: how many the model has.
        warn: where a warning goes.
    """
    if known is not None or data.classes is None or data.classes == tuple(map(str, range(len(data.classes)))):
        return
    some = ", ".join(f"{printable(name)} = {number}" for number, name in enumerate(data.classes[:3]))
    if len(data.classes) != classes:
        warn(
            f"{data.name} has {len(data.classes)} class names, but the model has {classes} classes without names. They "
            f"were taken in order ({some}, ...), which is right only if it was trained so; labels as numbers are safe."
        )
        return
    more = ", ..." if len(data.classes) > 3 else ""
    logger.info("%s: the model names no classes, so those of the data are taken in order: %s%s.", data.name, some, more)
