"""Data sets: read once, kept as tensors, handed out in encoded batches."""

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from unbackdoor._data.augmentation import Augmentation, augmentation
from unbackdoor._data.columns import check_column, joined, labels_of
from unbackdoor._data.conversation_encoder import ConversationEncoder
from unbackdoor._data.conversations import Conversations
from unbackdoor._data.decoding import undecoded_cells
from unbackdoor._data.images import ImageEncoder, Images
from unbackdoor._data.items import Items
from unbackdoor._data.lengths import sizes_of_one_length
from unbackdoor._data.pair_encoder import PairEncoder
from unbackdoor._data.pairs import ImageCaptionPairs
from unbackdoor._data.reading import opened
from unbackdoor._data.splits import stratified
from unbackdoor._data.texts import TextEncoder, Texts, Tokens
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import reader
from unbackdoor._modes import in_own_modes

logger = logging.getLogger("unbackdoor")

Augment = Literal["auto", "flip", "crop", "none"]

ItemsLike = Items | Tensor
"""The items that `Dataset` takes; it turns a tensor of pixels into `Images`."""

Encoder = ImageEncoder | TextEncoder | ConversationEncoder | PairEncoder
"""Reads items from the columns of a data set and makes model inputs of them; all kinds have the same methods."""


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
    """Examples with their labels, and the encoder that makes model inputs of them.

    Args:
        items: `Images`, or a tensor of their pixels at the data set's own size, (n, channels, height, width), uint8; or
            `Texts`, `Conversations` or `ImageCaptionPairs`, which are tokenised here.
        labels: class indices, (n,), int64; -1 for an example without one, as each conversation.
        encode: makes model inputs of a batch of items.
        classes: class names in label order, if they are known.
        augment: applied to training batches of images.
        groups: group of each row, (n,), int64; rows of one class and group stay together (frames of one video, say).
        rows: places of the examples in the source, (n,), int64, -1 without one; None for their positions here.
        columns: the source's own names of columns, as they were passed to `load`; a copy keeps them.
        name: name of the data in messages.
    """

    items: ItemsLike
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
        object.__setattr__(self, "labels", _indices(self.labels, len(self._items), self.name))

    @classmethod
    @reader("source")
    @in_own_modes
    def load(
        cls,
        source: str | Path | Sequence[str | Path],
        encode: Encoder | None = None,
        *,
        columns: dict[str, str] | None = None,
        classes: Sequence[str] | None = None,
        augment: Augment = "auto",
        group: str | None = None,
        labelled: bool = True,
        unread: dict[int, str] | None = None,
    ) -> "Dataset":
        """Read examples.

        Args:
            source: a parquet, CSV or JSON-lines file (or a pattern, or several), an image folder with one folder per
                class, or a directory written by `datasets.save_to_disk`.
            encode: as `load` returns it; without it images are not changed.
            columns: the data's names for `label` and for `image`, `text`, or `text_a` and `text_b`, if they differ; of
                conversations for `messages`, for `instruction`, `input` and `output`, or for `prompt` and `response`;
                of pairs for `image` and `caption`.
            classes: the model's class names; labels are matched to them by name.
            augment: see `unbackdoor._data.augmentation.augmentation`.
            group: column whose equal values keep rows of one class together when the data is split.
            labelled: False reads no labels, and the pictures of an image folder at any depth; each label is then -1.
                Pairs need no labels: without a column of them, each is -1 as well.
            unread: takes why pictures without labels cannot be read, by row, and these are left out; None refuses them.

        Raises:
            UnbackdoorError: the data is missing, empty, lacks a column, or has a picture that cannot be decoded or an
                empty text.
        """
        encode = ImageEncoder() if encode is None else encode
        where = _name(source)
        names = dict(columns or {})
        labelled = labelled and encode.labelled
        known_names = (*encode.column_names, "label") if encode.labelled else encode.column_names
        strange = next((name for name in names if name not in known_names), None)
        if strange is not None:
            allowed = f"{', '.join(known_names[:-1])} or {known_names[-1]}"
            raise UnbackdoorError(f"`columns` must name {allowed}, got {strange}. Leave that one out.")
        label = names.get("label", "label")
        tables = opened(source, where, label=label, classes=classes, labelled=labelled)
        if not any(len(cells) for table in tables for cells in table.cells.values()):
            raise UnbackdoorError(f"{where} has no rows; at least one {'labelled ' * labelled}example is needed.")
        if not encode.needs_labels and "label" not in names and label not in tables[0].cells:
            labelled = False
        parts = encode.columns_in([*tables[0].cells, *tables[0].twice], names, where, tables[0].hint)
        wanted = {**parts, **({"label": label} if labelled else {}), **({"group": group} if group else {})}
        for name, column in wanted.items():
            check_column(tables, name, column, where)
        cells: dict[str, Sequence[Any]] = {name: joined(tables, column) for name, column in parts.items()}
        if labelled:
            labels, known = labels_of(tables, label, classes, where)
            items, encode, rows = _read(encode, cells, where, tables[0].folder, None)
        else:
            items, encode, rows = _read(encode, cells, where, tables[0].folder, unread)
            labels, known = torch.full((len(items),), -1), None if classes is None else tuple(classes)
        groups = None
        if group is not None:
            keys = [f"{label}/{key}" for label, key in zip(labels.tolist(), joined(tables, group), strict=True)]
            groups = torch.from_numpy(np.unique(keys, return_inverse=True)[1])
        return cls(
            items=items,
            labels=labels,
            encode=encode,
            classes=known,
            augment=augmentation(augment, items.shape[1:], known),
            groups=groups,
            rows=rows,
            columns=names,
            name=where,
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def _items(self) -> Items:
        """The prepared items."""
        return cast(Items, self.items)

    @property
    def _encode(self) -> Callable[[Items], Tensor | Tokens]:
        """The encoder, typed for items of its kind: the data has no others."""
        return cast(Callable[[Items], Tensor | Tokens], self.encode)

    @property
    def modality(self) -> Literal["images", "text", "conversations", "image-text"]:
        """The kind of the items: `images`, `text`, `conversations` or `image-text`."""
        return self.encode.modality

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of images; () of texts."""
        return tuple(self.items.shape[1:])

    @property
    def pixels(self) -> Tensor:
        """The items of a data set of images as a plain tensor, (n, channels, height, width), uint8."""
        assert isinstance(self.items, Images), "texts have no pixels"
        return self.items.as_subclass(Tensor)

    @property
    def pictures(self) -> Tensor:
        """The images of a data set of images or of pairs as a plain tensor, (n, channels, height, width), uint8."""
        return self.pairs.images.as_subclass(Tensor) if isinstance(self.items, ImageCaptionPairs) else self.pixels

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
    def text_encoder(self) -> TextEncoder:
        """The encoder of a data set of texts."""
        assert isinstance(self.encode, TextEncoder), "images have another encoder"
        return self.encode

    @property
    def conversations(self) -> Conversations:
        """The items of a data set of conversations."""
        assert isinstance(self.items, Conversations), "the data holds no conversations"
        return self.items

    @property
    def conversation_encoder(self) -> ConversationEncoder:
        """The encoder of a data set of conversations."""
        assert isinstance(self.encode, ConversationEncoder), "the data holds no conversations"
        return self.encode

    @property
    def pairs(self) -> ImageCaptionPairs:
        """The items of a data set of images and captions."""
        assert isinstance(self.items, ImageCaptionPairs), "the data holds no pairs"
        return self.items

    @property
    def pair_encoder(self) -> PairEncoder:
        """The encoder of a data set of images and captions."""
        assert isinstance(self.encode, PairEncoder), "the data holds no pairs"
        return self.encode

    @property
    def has_labels(self) -> bool:
        """Whether each example has a label."""
        return bool((self.labels >= 0).all())

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of a data set of texts, conversations or captions, from transformers."""
        if isinstance(self.encode, PairEncoder):
            return self.encode.texts.tokenizer
        return self.conversation_encoder.tokenizer if self.modality == "conversations" else self.text_encoder.tokenizer

    def class_name(self, label: int) -> str:
        """The printable name of a class; its number if the names are unknown, or fewer than a model's classes."""
        return printable(self.classes[label]) if self.classes and label < len(self.classes) else str(label)

    def identities(self) -> list[Hashable]:
        """Returns something hashable for each item, equal for equal items."""
        return self._items.identities()

    @in_own_modes
    def select(self, rows: Tensor | np.ndarray | Sequence[int] | Sequence[bool]) -> "Dataset":
        """The examples of some rows, in that order; or those for which a mask, with an entry for each row, is true.

        Raises:
            UnbackdoorError: a mask has not one entry for each row.
        """
        index = torch.as_tensor(rows, device=self.labels.device)
        if index.dtype == torch.bool:  # as numbers, these would be the rows 0 and 1
            if index.shape != self.labels.shape:
                raise UnbackdoorError(
                    f"Dataset.select takes a mask with an entry for each of {len(self):,} rows, got one of shape "
                    f"{tuple(index.shape)}."
                )
            index = index.nonzero()[:, 0]
        index = index.to(torch.int64)
        groups = None if self.groups is None else self.groups[index]
        origin = index if self.rows is None else self.rows[index]
        return replace(self, items=self._items[index], labels=self.labels[index], groups=groups, rows=origin)

    @in_own_modes
    def split(self, count: int, *, seed: int) -> tuple["Dataset", "Dataset"]:
        """`count` examples and the rest, stratified by class (groups, if there are any, stay whole)."""
        chosen = stratified(self.labels, count, seed=seed, groups=self.groups)
        rest = np.setdiff1d(np.arange(len(self)), chosen)
        return self.select(chosen), self.select(rest)

    def joined(self, others: "Dataset") -> "Dataset":
        """These examples, then those of another data set, augmented as these are; they have no place in the source."""
        labels = torch.cat([self.labels, others.labels])
        own = torch.arange(len(self)).to(labels) if self.rows is None else self.rows
        rows = torch.cat([own, torch.full_like(others.labels, -1)])
        return replace(self, items=self._items.joined(others._items), labels=labels, groups=None, rows=rows)

    def replaced(self, rows: Tensor, items: ItemsLike) -> "Dataset":
        """Returns the same examples with other items in some rows; labels are kept.

        Args:
            rows: numbers of these rows, (k,).
            items: k other items of the same kind.
        """
        return replace(self, items=self._items.replaced(rows, cast(Items, items)))

    def encoded_by(self, encode: Encoder) -> "Dataset":
        """The same examples for another model.

        Args:
            encode: encoder of that model.

        Raises:
            UnbackdoorError: pictures went through the steps of one model's processor when they were read, since they
                had several sizes, and the other model's processor takes other steps.
        """
        return replace(self, encode=encode.in_place_of(self.encode, self.name))

    def brought(self) -> "Dataset":
        """The same pictures, resized and cropped for the model already, as those of several sizes are."""
        encode = self.encode
        if not isinstance(encode, ImageEncoder) or encode.done:
            return self
        return replace(self, items=encode.placed(self.pixels), encode=replace(encode, done=True))

    def inputs(self, rows: Tensor | slice) -> Tensor | Tokens:
        """The model inputs of some rows, without augmentation."""
        return self._encode(self._items[rows])

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set with its tensors on another device."""
        return replace(
            self,
            items=self._items.on(device),
            labels=self.labels.to(device),
            groups=None if self.groups is None else self.groups.to(device),
            rows=None if self.rows is None else self.rows.to(device),
        )

    def augmented(self, generator: torch.Generator) -> "Dataset":
        """Returns the same examples, augmented once and then never again; `generator` is on the CPU."""
        return replace(self, items=self._items.augmented(self.augment, generator), augment=Augmentation.none())

    def distorted(self) -> "Dataset":
        """The same data set with stronger augmentation, for methods that look at it many times."""
        return replace(self, augment=replace(self.augment, distort=True))

    def batches(self, size: int, *, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Encoded batches of at most `size` examples: in order, or shuffled and augmented if a generator is given.

        Texts come sorted by length, and in order also of one length if the model needs that (`TextEncoder.unpadded`);
        `rows` of a batch are their numbers.

        The generator lives on the CPU whatever the device, so that a seed gives the same batches everywhere.
        """
        order = self._items.order(size, generator)
        sizes = [size] * (len(order) // size) + [len(order) % size] * (len(order) % size > 0)
        if generator is not None and len(sizes) > 1 and sizes[-1] == 1:
            sizes[-2:] = [size + 1]  # BatchNorm cannot learn from a batch of one
        if generator is None and isinstance(self.encode, TextEncoder) and self.encode.unpadded:
            sizes = sizes_of_one_length(self.texts.lengths[order.to(self.labels.device)], size)
        for rows in order.to(self.labels.device).split(sizes):
            items = self._items[rows]
            inputs = self._encode(items if generator is None else items.augmented(self.augment, generator))
            yield Batch(inputs, self.labels[rows], rows)


def check_data(owner: str, **data: object) -> None:
    """Refuse anything but data sets, such as the path of one.

    Args:
        owner: the function that takes them, for messages.
        data: data sets by the names of their parameters, the first of which is needed; None for others that were not
            given.

    Raises:
        UnbackdoorError: says how to load one.
    """
    for number, (parameter, given) in enumerate(data.items()):
        if not isinstance(given, Dataset) and (given is not None or number == 0):
            raise UnbackdoorError(
                f"{owner} takes {parameter} as a Dataset, got {type(given).__name__}. Load it with "
                "unbackdoor.Dataset.load."
            )


def _indices(labels: object, count: int, name: str) -> Tensor:
    """Returns labels as class indices, (count,), int64.

    Raises:
        UnbackdoorError: they are no whole numbers, or not one for each example.
    """
    if isinstance(labels, list | tuple | np.ndarray):
        array = np.asarray(labels)
        if array.dtype.kind not in "biu" or array.ndim == 0:
            kind = {"U": "text", "S": "text", "O": "objects"}.get(array.dtype.kind, str(array.dtype))
            raise UnbackdoorError(_wrong_labels(kind, array.shape, count, name))
        labels = torch.from_numpy(array.astype(np.int64))
    if not isinstance(labels, Tensor):
        raise UnbackdoorError(_wrong_labels(type(labels).__name__, None, count, name))
    if labels.is_floating_point() or labels.is_complex() or labels.shape != (count,):
        kind = str(labels.dtype).removeprefix("torch.")
        raise UnbackdoorError(_wrong_labels(kind, tuple(labels.shape), count, name))
    return labels.long()


def _wrong_labels(kind: str, shape: tuple[int, ...] | None, count: int, name: str) -> str:
    shown = kind if shape is None else f"{kind} of shape {shape}"
    return (
        f"Dataset.labels of {name} must be class indices, one whole number for each of its {count:,} examples, got "
        f"{shown}. Give a tensor of type int64 and shape ({count},)."
    )


def _name(source: str | Path | Sequence[str | Path]) -> str:
    if isinstance(source, str | Path):
        return str(source)
    if not isinstance(source, Sequence) or not source or not all(isinstance(path, str | Path) for path in source):
        raise UnbackdoorError(f"The data must be a path, or several in a list, got {source!r}.")
    return ", ".join(map(str, source))


def _read(
    encode: Encoder, cells: dict[str, Sequence[Any]], where: str, folder: Path | None, unread: dict[int, str] | None
) -> tuple[Any, Any, Tensor | None]:
    """Returns the items, their encoder, and the rows of these, if pictures that cannot be read were left out.

    These are looked for only if the reading fails; if there is none, or no other, that failure is raised.
    """
    try:
        return *encode.read(cells, where, folder), None
    except UnbackdoorError:
        if unread is None or not isinstance(encode, ImageEncoder):
            raise
        reasons = undecoded_cells(cells["image"], where, folder)
        if len(reasons) in (0, len(cells["image"])):
            raise
        unread.update(reasons)
        kept = [row for row in range(len(cells["image"])) if row not in reasons]
        return *encode.read({"image": [cells["image"][row] for row in kept]}, where, folder), torch.tensor(kept)
