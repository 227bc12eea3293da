"""Data sets: read once, kept as tensors, handed out in encoded batches."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unbackdoor._errors import UnbackdoorError
from unbackdoor._images import Augmentation, ImageEncoder, augmentation

logger = logging.getLogger("unbackdoor")

Augment = Literal["auto", "flip", "crop", "none"]


class Batch(NamedTuple):
    """Model inputs and class indices (batch,) on one device."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Examples with their labels, and the way into the model.

    Args:
        items: pixels at the data set's own size, (n, channels, height, width), uint8.
        labels: class indices, (n,), int64.
        encode: makes model inputs of a batch of items.
        classes: class names in label order, where known.
        augment: applied to training batches.
        groups: rows of one group belong together (the frames of one video, say), (n,), int64.
        name: how messages call the data.
    """

    items: Tensor
    labels: Tensor
    encode: ImageEncoder = field(default_factory=ImageEncoder)
    classes: tuple[str, ...] | None = None
    augment: Augmentation = field(default_factory=Augmentation.none)
    groups: Tensor | None = None
    name: str = "the data"

    @classmethod
    def load(
        cls,
        source: str | Path | Sequence[str | Path],
        encode: ImageEncoder | None = None,
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
            columns: the data's names for `image` and `label`, where they differ.
            classes: the model's class names; labels are matched to them by name.
            augment: see `unbackdoor._images.augmentation`.
            group: column whose equal values keep rows together when the data is split.

        Raises:
            UnbackdoorError: the data is missing, empty, lacks a column, or has a picture that cannot be decoded.
        """
        encode = encode or ImageEncoder()
        where = _name(source)
        table, folder = _opened(source, where)
        names = {"image": "image", "label": "label", **(columns or {})}
        for wanted in names:
            if wanted not in ("image", "label"):
                raise UnbackdoorError(f"--columns knows image and label, got {wanted!r}.")
        for wanted, column in {**names, **({"group": group} if group else {})}.items():
            if column not in table.column_names:
                option = "--group" if wanted == "group" else f"--columns {wanted}=NAME"
                raise UnbackdoorError(
                    f"{where} has no column {column!r}; it has {', '.join(table.column_names)}. Name it by {option}."
                )
        if len(table) == 0:
            raise UnbackdoorError(f"{where} has no rows; at least one labelled example is needed.")
        feature = table.features[names["label"]]
        labels, known = _labels(table[names["label"]], getattr(feature, "names", None), classes, where)
        items = encode.read(table.with_format(None)[names["image"]], where, folder)
        groups = None
        if group is not None:
            keys = [f"{label}/{key}" for label, key in zip(labels.tolist(), table[group], strict=True)]
            groups = torch.from_numpy(np.unique(keys, return_inverse=True)[1])
        return cls(
            items=items,
            labels=labels,
            encode=encode,
            classes=known,
            augment=augmentation(augment, items, known or classes),
            groups=groups,
            name=where,
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the items."""
        channels, height, width = self.items.shape[1:]
        return channels, height, width

    def select(self, rows: Tensor | np.ndarray | Sequence[int]) -> "Dataset":
        """The examples of some rows, in that order."""
        index = torch.as_tensor(rows, device=self.labels.device)
        groups = None if self.groups is None else self.groups[index]
        return replace(self, items=self.items[index], labels=self.labels[index], groups=groups)

    def split(self, count: int, *, seed: int) -> tuple["Dataset", "Dataset"]:
        """`count` examples and the rest, stratified by class (groups stay whole where there are any)."""
        chosen = stratified(self.labels, count, seed=seed, groups=self.groups)
        rest = np.setdiff1d(np.arange(len(self)), chosen)
        return self.select(chosen), self.select(rest)

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set with its tensors on another device."""
        return replace(self, items=self.items.to(device), labels=self.labels.to(device))

    def batches(self, size: int, *, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Encoded batches of at most `size` examples: in order, or shuffled and augmented where a generator is given.

        The generator lives on the CPU whatever the device, so that a seed gives the same batches everywhere.
        """
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        sizes = [size] * (len(order) // size) + [len(order) % size] * (len(order) % size > 0)
        if generator is not None and len(sizes) > 1 and sizes[-1] == 1:
            sizes[-2:] = [size + 1]  # BatchNorm cannot learn from a batch of one
        for rows in order.to(self.labels.device).split(sizes):
            items = self.items[rows]
            if generator is not None:
                items = self.augment(items, generator)
            yield Batch(self.encode(items), self.labels[rows])


def stratified(labels: Tensor, count: int, *, seed: int, groups: Tensor | None = None) -> np.ndarray:
    """Row numbers of a stratified draw, sorted: each class has its share of `count`, rounded by largest remainder.

    With groups, whole groups are drawn class by class until the class's share is reached, so the count may differ.

    Raises:
        UnbackdoorError: more rows asked for than there are.
    """
    if not 0 < count < len(labels):
        raise UnbackdoorError(f"A part must hold 1 to {len(labels) - 1:,} of {len(labels):,} examples, got {count:,}.")
    random = np.random.default_rng(seed)
    label = labels.cpu().numpy()
    kinds, sizes = np.unique(label, return_counts=True)
    exact = sizes * count / len(label)
    share = np.floor(exact).astype(int)
    share[np.argsort(share - exact, kind="stable")[: count - share.sum()]] += 1
    chosen: list[np.ndarray] = []
    for kind, quota in zip(kinds, share, strict=True):
        rows = np.flatnonzero(label == kind)
        if groups is None:
            chosen.append(random.permutation(rows)[:quota])
            continue
        owner = groups.cpu().numpy()[rows]
        taken = 0
        for group in random.permutation(np.unique(owner)):
            if taken >= quota:
                break
            chosen.append(rows[owner == group])
            taken += len(chosen[-1])
    return np.sort(np.concatenate(chosen))


def _name(source: str | Path | Sequence[str | Path]) -> str:
    if isinstance(source, str | Path):
        return str(source)
    return ", ".join(map(str, source))


def _opened(source: str | Path | Sequence[str | Path], where: str) -> tuple[Any, Path | None]:
    """The rows as an arrow-backed `datasets.Dataset` with undecoded images, and the folder of relative paths."""
    import datasets

    paths = [Path(source)] if isinstance(source, str | Path) else [Path(part) for part in source]
    files: list[Path] = []
    for path in paths:
        matches = sorted(path.parent.glob(path.name)) if not path.exists() and "*" in path.name else [path]
        if not matches or not matches[0].exists():
            raise UnbackdoorError(f"{path} does not exist; DATA is a file or a folder with labelled examples.")
        files += matches
    first = files[0]
    try:
        if first.is_dir() and (first / "dataset_info.json").exists():
            table, folder = datasets.load_from_disk(str(first)), first
        elif first.is_dir() and (first / "dataset_dict.json").exists():
            raise UnbackdoorError(f"{first} holds several splits; name one of them, such as {first}/train.")
        elif first.is_dir() and not list(first.glob("*.parquet")):
            table, folder = _image_folder(first), first
        else:
            inside = sorted(first.glob("*.parquet")) if first.is_dir() else files
            table, folder = _tabular(inside), first if first.is_dir() else first.parent
    except UnbackdoorError:
        raise
    except Exception as problem:  # whatever a reader of a foreign format may raise
        reason = str(problem.__cause__ or problem).split("\n")[0]
        raise UnbackdoorError(f"{where} cannot be read as labelled examples: {reason}") from problem
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table, folder


def _tabular(files: list[Path]) -> Any:
    import datasets

    kinds = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
    suffix = files[0].suffix.lower()
    if suffix not in kinds:
        raise UnbackdoorError(
            f"{files[0]} is not of a known kind; DATA is .parquet, .csv, .json, .jsonl, an image folder or a saved "
            "data set."
        )
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        loaded = datasets.load_dataset(
            kinds[suffix],
            data_files=[str(file) for file in files],
            split="train",
            cache_dir=cache,
            keep_in_memory=True,
        )
    if bars:
        datasets.enable_progress_bars()
    return loaded


def _image_folder(folder: Path) -> Any:
    """One folder per class, in alphabetical order, pictures inside."""
    import datasets
    from PIL import Image

    Image.init()
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UnbackdoorError(f"{folder} has no sub-folders; an image folder has one per class, with its pictures.")
    paths, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).rglob("*")):
            if path.suffix.lower() in Image.EXTENSION:
                paths.append(str(path.relative_to(folder)))
                labels.append(label)
    table = datasets.Dataset.from_dict({"image": paths, "label": labels})
    return table.cast_column("label", datasets.ClassLabel(names=classes))


def _labels(
    column: Sequence[Any], names: list[str] | None, classes: Sequence[str] | None, where: str
) -> tuple[Tensor, tuple[str, ...] | None]:
    """Class indices in the model's order, and the class names where they are known."""
    values = list(column)
    missing = next((row for row, given in enumerate(values) if given is None), None)
    if missing is not None:
        raise UnbackdoorError(f"{where} has no label in row {missing}; every row needs one.")
    if isinstance(values[0], str):
        if all(given.strip().lstrip("-").isdigit() for given in values):
            values = [int(given) for given in values]
        else:
            names = sorted(set(values))
            position = {name: index for index, name in enumerate(names)}
            if classes is not None and set(names) <= set(classes):
                names, position = list(classes), {name: index for index, name in enumerate(classes)}
            values = [position[given] for given in values]
    elif isinstance(values[0], list | float):
        raise UnbackdoorError(
            f"{where} has the label {values[0]!r} in row 0; labels must be whole numbers or class names "
            "(several labels or a number to predict are not supported)."
        )
    labels = torch.tensor(values, dtype=torch.int64)
    if names is None or classes is None or list(names) == list(classes):
        return labels, tuple(names or classes or ()) or None
    if set(names) <= set(classes) and len(set(classes)) == len(classes):
        logger.info("%s lists its classes in another order than the model; they were matched by name.", where)
        _check_range(labels, len(names), where, "it names")
        moved = torch.tensor([list(classes).index(name) for name in names])
        return moved[labels], tuple(classes)
    strange = next(name for name in names if name not in classes)
    raise UnbackdoorError(
        f"{where} has the class {strange!r}, which the model does not know; its classes are "
        f"{', '.join(list(classes)[:10])}. Rename the classes, or take other data."
    )


def check_labels(data: Dataset, classes: int) -> None:
    """Refuse a label that the model's head does not have."""
    _check_range(data.labels, classes, data.name, "the model has")


def _check_range(labels: Tensor, classes: int, where: str, owner: str) -> None:
    outside = torch.nonzero((labels < 0) | (labels >= classes)).flatten()
    if len(outside):
        row = int(outside[0])
        raise UnbackdoorError(
            f"{where} has label {int(labels[row])} in row {row}, but {owner} {classes} classes (0 to {classes - 1}). "
            "Correct the label, or take other data."
        )
