"""Data sets: read once, kept as tensors, handed out in encoded batches."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unbackdoor._data.augmentation import Augmentation, augmentation
from unbackdoor._data.columns import check_column, check_label_names, columns_of, joined, listed
from unbackdoor._data.images import ImageEncoder
from unbackdoor._data.labels import class_numbers
from unbackdoor._data.reading import opened
from unbackdoor._data.splits import stratified
from unbackdoor._data.texts import TextEncoder, Texts, Tokens
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

    @property
    def pixels(self) -> Tensor:
        """The inputs of a batch of images, (batch, channels, height, width)."""
        assert isinstance(self.inputs, Tensor), "texts have no pixels"
        return self.inputs


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
            augment: see `unbackdoor._data.augmentation.augmentation`.
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
                    f"{where} holds text ({listed(present)}), but images are needed. Take a data set with pictures, "
                    "or a model for text (attack: --base)."
                )
        names = {**parts, "label": label}
        for wanted, column in {**names, **({"group": group} if group else {})}.items():
            check_column(tables, wanted, column, where)
        stands_for = tables[0].names.get(label)
        if any(table.names.get(label) != stands_for for table in tables):
            raise UnbackdoorError(f"{where} has files that name their classes otherwise. Give them one by one.")
        labels, known = class_numbers(joined(tables, label), stands_for, classes, where)
        check_label_names(tables, label, labels, known, where)
        cells: dict[str, Sequence[Any]] = {name: joined(tables, column) for name, column in parts.items()}
        items, encode = encode.read(cells, where, tables[0].folder)
        groups = None
        if group is not None:
            keys = [f"{label}/{key}" for label, key in zip(labels.tolist(), joined(tables, group), strict=True)]
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
    def image_encoder(self) -> ImageEncoder:
        """The encoder of a data set of images."""
        assert isinstance(self.encode, ImageEncoder), "texts have another encoder"
        return self.encode

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


def _name(source: str | Path | Sequence[str | Path]) -> str:
    if isinstance(source, str | Path):
        return str(source)
    if not isinstance(source, Sequence) or not source or not all(isinstance(path, str | Path) for path in source):
        raise UnbackdoorError(f"DATA must be a path, or several in a list, got {source!r}.")
    return ", ".join(map(str, source))
