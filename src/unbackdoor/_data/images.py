"""Images: read once, and encoded for a model batch by batch."""

import copy
import logging
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unbackdoor._data.augmentation import Augmentation
from unbackdoor._data.columns import image_column
from unbackdoor._data.decoding import UNFOLDED, decode_cell, encoded_length, report_changes
from unbackdoor._data.geometry import Crop, Resample, Resize, ResizeEdge, Size, Step, applied, applied_alone
from unbackdoor._errors import UnbackdoorError, printable

logger = logging.getLogger("unbackdoor")

LARGEST_SIDE = 2048  # side in pixels of the largest square that a model may get; classifiers take up to about 1,000


class Images(Tensor):
    """Pictures of one size: pixels, (n, channels, height, width), uint8.

    They are a tensor, so that every function of torch takes them. Results of torch are plain tensors, except for a
    selection of the pictures (`images[rows]`), which is `Images` again.
    """

    # As torch's documentation says: results of torch's functions are not of this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, pixels: Tensor) -> "Images":
        """Returns the images of a tensor, and shares its memory."""
        return pixels.as_subclass(cls)

    @overload
    def __getitem__(self, rows: Tensor | slice) -> "Images": ...
    @overload
    def __getitem__(self, rows: Any) -> Tensor: ...
    def __getitem__(self, rows: Any) -> Tensor:
        """Returns some of the pictures; or, as for any tensor, one of them or a part of each."""
        part = super().__getitem__(rows)
        return Images(part) if part.ndim == self.ndim else part

    def __deepcopy__(self, memo: dict[int, Any]) -> "Images":
        return Images(copy.deepcopy(self.as_subclass(Tensor), memo))

    def joined(self, others: "Images") -> "Images":
        """These pictures, then the others."""
        return Images(torch.cat([self, others]))

    def replaced(self, rows: Tensor, others: Tensor) -> "Images":
        """These pictures, with others in some rows."""
        pixels = self.clone()
        pixels[rows] = others
        return Images(pixels)

    def identities(self) -> list[Hashable]:
        """The bytes of each picture."""
        return [picture.numpy().tobytes() for picture in self]

    def on(self, device: torch.device | str) -> "Images":
        """The same pictures on another device."""
        return Images(self.to(device))

    def augmented(self, augment: Augmentation, generator: torch.Generator) -> "Images":
        """Returns augmented pictures for training; `generator` is on the CPU."""
        return Images(augment(self, generator))

    def order(self, size: int, generator: torch.Generator | None) -> Tensor:
        """Returns the row numbers in order, or shuffled if a generator is given; see `Items`."""
        return torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)


@dataclass(frozen=True, kw_only=True)
class ImageEncoder:
    """Makes model inputs from pixels at the data set's own size.

    Args:
        mean: mean per channel, subtracted after scaling to [0, 1].
        std: standard deviation per channel.
        size: (height, width) to resize to; None keeps the data's own.
        shortest_edge: instead of `size`, pixels of the shorter side after resizing.
        crop: (height, width) of the centre crop after resizing; None for no crop.
        resample: filter for resizing; antialiased, as Pillow's.
        scale: value of a pixel of 255 before normalising, divided by 255.
        channels: 3 for colour, 1 for grey, None for those of the data.
        geometry: changes of size and shape, in order, if `size`, `shortest_edge` and `crop` cannot express them.
        reverse_channels: the model takes blue first.
        padded: (height, width) after padding with zeros right and below, after normalising; None for no padding.
        done: pixels are already resized and cropped, as in a data set with pictures of several sizes.

    Raises:
        UnbackdoorError: mean or std is not one number, or one per channel, or std is not above 0, or there is no such
            filter.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    size: Size | None = None
    shortest_edge: int | None = None
    crop: Size | None = None
    resample: Resample = "bilinear"
    scale: float = 1 / 255
    channels: int | None = None
    geometry: tuple[Step, ...] | None = None
    reverse_channels: bool = False
    padded: Size | None = None
    done: bool = False

    modality: ClassVar[Literal["images"]] = "images"
    column_names: ClassVar[tuple[str, ...]] = ("image",)
    labelled: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, least in (("mean", -math.inf), ("std", 0.0)):
            entry: tuple[float, ...] = getattr(self, name)
            if len(entry) not in (1, self.channels or 3) or not all(least < part < math.inf for part in entry):
                allowed = "1 number" if self.channels == 1 else f"1 or {self.channels or 3} numbers"
                above = " above 0" if name == "std" else ""
                raise UnbackdoorError(
                    f"ImageEncoder.{name} must be {allowed}{above}, got {','.join(f'{part:g}' for part in entry)}."
                )

        if self.resample not in get_args(Resample):
            raise UnbackdoorError(
                f"ImageEncoder.resample must be one of {', '.join(get_args(Resample))}, got {printable(self.resample)}."
            )

    @property
    def steps(self) -> tuple[Step, ...]:
        """The changes of the size and shape of pictures, in order."""
        if self.geometry is not None:
            return self.geometry
        steps: list[Step] = []
        if self.shortest_edge is not None:
            steps.append(ResizeEdge(self.shortest_edge))
        elif self.size is not None:
            steps.append(Resize(self.size))
        if self.crop is not None:
            steps.append(Crop(self.crop))
        return tuple(steps)

    @property
    def form(self) -> tuple[Any, ...]:
        """The fields that determine the pixels of a picture: encoders of one form share data that is `done`."""
        return self.steps, self.resample, self.channels

    def target(self, size: Size) -> Size:
        """Returns (height, width) at which the model gets pictures of some size.

        Raises:
            UnbackdoorError: nothing is left of such pictures, or they are larger than the padded size.
        """
        target = size
        for step in () if self.done else self.steps:
            before, target = target, step.target(target)
            # Only enlarging is checked: a step that makes a large photo smaller is welcome.
            if target[0] > before[0] or target[1] > before[1]:
                self._check_area(size, target)
            if min(target) < 1:
                raise UnbackdoorError(
                    f"The model's processor leaves no pixel of pictures of {size[1]}x{size[0]}. Give `image_size`."
                )
        self._check_area(size, target)
        if self.padded is None:
            return target
        if target[0] > self.padded[0] or target[1] > self.padded[1]:
            raise UnbackdoorError(
                f"The model's processor pads pictures to {self.padded[1]}x{self.padded[0]}, but has them at "
                f"{target[1]}x{target[0]} before. Give `image_size`."
            )
        return self.padded

    def _check_area(self, size: Size, target: Size) -> None:
        """Refuse a size that no classifier takes: with a shorter side of 224, 1 x 30,000 becomes 224 x 6,720,000."""
        if target[0] * target[1] > LARGEST_SIDE**2:
            raise UnbackdoorError(
                f"Pictures of {size[1]:,}x{size[0]:,} would reach the model with {target[1]:,}x{target[0]:,} pixels, "
                f"more than {LARGEST_SIDE:,}x{LARGEST_SIDE:,}. Give `image_size`, or smaller pictures."
            )

    def __call__(self, pixels: Tensor) -> Tensor:
        """Encode a batch.

        Args:
            pixels: (batch, channels, height, width), uint8; or floats in [0, 255], which pass gradients on.

        Returns:
            inputs of the model, (batch, channels, height, width), float32.
        """
        height, width = self.target((pixels.shape[-2], pixels.shape[-1]))
        placed = pixels if self.done else self.placed(pixels)
        if self.reverse_channels:
            placed = placed.flip(1)
        mean = torch.tensor(self.mean, device=pixels.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(1, -1, 1, 1)
        if placed.is_floating_point():
            inputs = (placed.float() * self.scale - mean) / std
        else:  # in one copy, which takes a third of the time
            inputs = placed.float().mul_(self.scale).sub_(mean).div_(std)
        return F.pad(inputs, (0, width - inputs.shape[-1], 0, height - inputs.shape[-2])) if self.padded else inputs

    def placed(self, pixels: Tensor) -> Tensor:
        """Returns a batch, resized and cropped, but with the channels and range of the data; see `__call__`."""
        for step in self.steps:
            pixels = applied(step, pixels, self.resample)
        return pixels

    def prepared(self, items: Any) -> Images:
        """Returns the pixels of a data set, not yet encoded: that is done batch by batch, after augmentation.

        Args:
            items: images, or a tensor of their pixels.

        Raises:
            UnbackdoorError: these are no images, or pixels in [0, 1].
        """
        if isinstance(items, np.ndarray) and items.dtype.kind in "uif":
            items = torch.from_numpy(items)
        if not isinstance(items, Tensor):
            if hasattr(items, "strings") or hasattr(items, "entries"):
                raise UnbackdoorError("The model takes images, but the data holds text. Take images.")
            raise UnbackdoorError(
                f"Images must be a tensor of pixels, (n, channels, height, width), uint8, got {type(items).__name__}. "
                "Dataset.load reads files."
            )
        if isinstance(items, Images):
            return items
        _check_pixels(items)
        return Images(items)

    def columns_in(self, present: Sequence[str], names: dict[str, str], where: str, hint: str = "") -> dict[str, str]:
        """The column of a data set that holds its pictures; see `image_column`."""
        return image_column(present, names, where)

    def recorded(self, items: object = None) -> dict[str, Any]:
        """Returns the entry `encode` of record.json."""
        return {key: getattr(self, key) for key in ("mean", "std", "size", "channels")}

    def in_place_of(self, previous: object, where: str) -> "ImageEncoder":
        """Returns this encoder for pictures that another one has read.

        Raises:
            UnbackdoorError: they went through the steps of one model's processor when they were read, since they had
                several sizes, and this processor takes other steps.
        """
        if not isinstance(previous, ImageEncoder):
            return self
        if previous.done and previous.form != self.form:
            raise UnbackdoorError(
                f"{where} has pictures of several sizes, or of more than a million pixels, and the two models that are "
                "to see them resize and crop pictures in different ways. Give small pictures of one size."
            )
        return replace(self, done=previous.done)

    def read(self, cells: dict[str, Sequence[Any]], where: str, folder: Path | None) -> tuple[Images, "ImageEncoder"]:
        """Decode the image column of a data set.

        Pictures of one size are not changed. Those of several sizes, and those of more than a million pixels, go
        through the encoder's steps one by one, as in the model's own processor; the rest of the encoding is done in
        batches.

        Args:
            cells: cells of `image`, encoded pictures: `{"bytes": ..., "path": ...}`, a path, a PIL image or an array.
            where: name of the data, for messages.
            folder: folder that relative paths start from.

        Returns:
            Pixels, (n, channels, height, width), uint8, and the encoder for them.

        Raises:
            UnbackdoorError: a picture cannot be decoded (names the row), or pictures of several sizes do not get the
                same size.
        """
        if self.done:  # this encoder has read another data set; these pictures come from their files
            return replace(self, done=False).read(cells, where, folder)
        if self.channels not in (None, 1, 3):
            raise UnbackdoorError(
                f"The model takes {self.channels} channels; pictures have 1 or 3, so {where} does not fit. Take a "
                "model for pictures."
            )
        changes: Counter[str] = Counter()
        sizes: Counter[Size] = Counter()
        images: list[Image.Image] = []
        grey, done = 0, False
        decoded = encoded = 0
        one_size = any(isinstance(step, Resize | Crop) for step in self.steps)
        for row, cell in enumerate(cells["image"]):
            image = decode_cell(cell, row, where, folder, changes)
            decoded, encoded = decoded + image.height * image.width, encoded + encoded_length(cell, folder)
            if decoded > UNFOLDED and decoded > 200 * encoded:  # a photo has 10, an empty page 1,000
                raise UnbackdoorError(
                    f"{where} has pictures of {encoded:,} bytes up to row {row}, which unfold to {decoded:,} pixels. "
                    "Take pictures of a usual size."
                )
            sizes[image.height, image.width] += 1
            grey += image.mode == "L"
            if self.channels is not None:
                image = image.convert("L" if self.channels == 1 else "RGB")
            if one_size and not done and (len(sizes) > 1 or _is_large(image)):
                images, done = [self._alone(each, where) for each in images], True
            images.append(self._alone(image, where) if done else image)
        channels = self.channels or (1 if grey == len(images) else 3)
        report_changes(changes, where, len(images))
        changed = len(images) - grey if channels == 1 else grey
        if changed:
            owner = "the model takes" if self.channels else "others have"
            kind, count = ("colour", "3 channels") if channels == 3 else ("grey", "1 channel")
            logger.info(
                "%s: %s images converted to %s, as %s %s.", where, f"{changed:,} of {len(images):,}", kind, owner, count
            )
        if done:
            height, width = images[0].height, images[0].width
        else:
            height, width = sizes.most_common(1)[0][0]
        self._report_sizes(sizes, (height, width), where, done=done)
        pixels = np.empty((len(images), channels, height, width), dtype=np.uint8)
        for row, image in enumerate(images):
            image = image if image.size == (width, height) else image.resize((width, height), _BILINEAR)
            array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
            pixels[row] = array if channels == 1 else array.transpose(2, 0, 1)
        return Images(torch.from_numpy(pixels)), replace(self, done=done)

    def _alone(self, image: Image.Image, where: str) -> Image.Image:
        """Returns a picture in the size and shape that the model gets, with pixel values not yet normalised."""
        self._target_in((image.height, image.width), where)
        for step in self.steps:
            image = applied_alone(step, image, self.resample)
        return image

    def _target_in(self, size: Size, where: str) -> Size:
        """Returns `target`, with messages that name the data."""
        try:
            return self.target(size)
        except UnbackdoorError as problem:
            raise UnbackdoorError(f"{where}: {problem}") from None

    def _report_sizes(self, sizes: Counter[Size], size: Size, where: str, *, done: bool) -> None:
        """Log in one line how the sizes of pictures changed."""
        height, width = size
        count = sum(sizes.values())
        if done and len(sizes) > 1:
            logger.info(
                "%s: %s images of %s sizes, each brought to %dx%d by the model's own steps when it is read.",
                where,
                f"{count:,}",
                f"{len(sizes):,}",
                width,
                height,
            )
        elif done and size not in sizes:
            ((before, _),) = sizes.items()
            logger.info(
                "%s: images of %dx%d are brought to %dx%d when they are read, as they are large.",
                where,
                before[1],
                before[0],
                width,
                height,
            )
        elif len(sizes) > 1 and self.steps:
            raise UnbackdoorError(
                f"{where} has pictures of {len(sizes):,} sizes, and the model's processor does not bring them to one. "
                "Give `image_size`, or pictures of one size."
            )
        elif len(sizes) > 1:
            odd = count - sizes[size]
            logger.info("%s: %s images resized to %dx%d.", where, f"{odd:,} of {count:,}", width, height)
        elif (reached := self._target_in(size, where)) != size:
            high, wide = reached
            logger.info("%s: images of %dx%d are resized to the model's %dx%d.", where, width, height, wide, high)


def _check_pixels(pixels: Tensor) -> None:
    """Refuse a tensor of another shape than images have, and other numbers than 0 to 255.

    Raises:
        UnbackdoorError: says how to make pixels of them.
    """
    if pixels.ndim != 4:
        raise UnbackdoorError(
            f"Images must have the shape (n, channels, height, width), got {tuple(pixels.shape)}. Add the channel of "
            "grey ones: pixels[:, None]."
        )
    if pixels.dtype == torch.uint8 or pixels.numel() == 0:
        return
    if pixels.is_complex():
        raise UnbackdoorError("Pixels must be numbers from 0 to 255, got complex ones. Give them as uint8.")
    least, most = float(pixels.min()), float(pixels.max())
    kind = str(pixels.dtype)
    if pixels.dtype == torch.bool or (pixels.is_floating_point() and least >= 0 and most <= 1):
        raise UnbackdoorError(
            f"Pixels must be numbers from 0 to 255, got {kind} of at most {most:g}, which is nearly black. Give (255 * "
            "pixels).round().to(torch.uint8)."
        )
    if pixels.is_floating_point() and least < 0 and most <= 20:
        raise UnbackdoorError(
            f"Pixels must be numbers from 0 to 255, got {kind} from {least:g} to {most:g}. Give them as uint8, before "
            "they are normalised: the encoder does that."
        )
    if not pixels.is_floating_point() and (least < 0 or most > 255):
        raise UnbackdoorError(
            f"Pixels must be numbers from 0 to 255, got {kind} from {least:g} to {most:g}. Give them as uint8."
        )


# Pixels of a picture, and of its longer side, above which it is resized when read: a thousand would take 3 GB.
_LARGE, _LONG = 2**20, 2**12

_BILINEAR = Image.Resampling.BILINEAR


def _is_large(image: Image.Image) -> bool:
    return image.height * image.width > _LARGE or max(image.size) > _LONG
