"""Images: decoding them once, bringing them into the form that a model expects, and augmenting them in batches."""

import contextlib
import functools
import io
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from unbackdoor._data.geometry import Crop, Resample, Resize, ResizeEdge, Size, Step, applied, applied_alone
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import MEBIBYTE, PICTURE, read_file

logger = logging.getLogger("unbackdoor")

LARGEST_SIDE = 2048  # pixels of a picture as a model sees it, if it is a square; classifiers take up to about 1,000

_LARGEST = 64_000_000  # pixels of a decoded picture

_UNFOLDED = 512 * MEBIBYTE  # of decoded pictures, from where on they are held against their files


@dataclass(frozen=True, kw_only=True)
class ImageEncoder:
    """From pixels at the data set's own size to the input of a model.

    Args:
        mean: subtracted per channel, after scaling to [0, 1].
        std: divided by, per channel.
        size: (height, width) to resize to; None keeps the data's own.
        shortest_edge: resize so that the shorter side has this many pixels, in place of `size`.
        crop: (height, width) of the centre crop after resizing; None for no crop.
        resample: filter for resizing; antialiased, as Pillow's.
        scale: what a pixel of 255 becomes before normalising, over 255.
        channels: 3 for colour, 1 for grey, None for what the data has.
        geometry: what is done to size and shape, in order, where `size`, `shortest_edge` and `crop` cannot say it.
        reverse_channels: the model takes blue first.
        padded: (height, width) that zeros fill up, right and below, after normalising; None for none.
        done: pixels come resized and cropped already, as they do where a data set had pictures of several sizes.

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
        """What is done to the size and shape of pictures, in order."""
        if self.geometry is not None:
            return self.geometry
        made: list[Step] = []
        if self.shortest_edge is not None:
            made.append(ResizeEdge(self.shortest_edge))
        elif self.size is not None:
            made.append(Resize(self.size))
        if self.crop is not None:
            made.append(Crop(self.crop))
        return tuple(made)

    @property
    def form(self) -> tuple[Any, ...]:
        """What decides which pixels come of a picture: encoders of one form can share data that is `done`."""
        return self.steps, self.resample, self.channels

    def target(self, size: Size) -> Size:
        """The (height, width) at which the model gets pictures of some size.

        Raises:
            UnbackdoorError: nothing is left of such pictures, or they are larger than what they are padded to.
        """
        made = size
        for step in () if self.done else self.steps:
            before, made = made, step.target(made)
            if made[0] > before[0] or made[1] > before[1]:  # what makes a large photo smaller is welcome
                self._check_area(size, made)
            if min(made) < 1:
                raise UnbackdoorError(
                    f"The model's processor leaves no pixel of pictures of {size[1]}x{size[0]}. Give --image-size."
                )
        self._check_area(size, made)
        if self.padded is None:
            return made
        if made[0] > self.padded[0] or made[1] > self.padded[1]:
            raise UnbackdoorError(
                f"The model's processor pads pictures to {self.padded[1]}x{self.padded[0]}, but has them at "
                f"{made[1]}x{made[0]} before. Give --image-size."
            )
        return self.padded

    def _check_area(self, size: Size, made: Size) -> None:
        """Refuse what no classifier takes: an edge of 224 pixels makes 224 x 6,720,000 of a picture of 1 x 30,000."""
        if made[0] * made[1] > LARGEST_SIDE**2:
            raise UnbackdoorError(
                f"Pictures of {size[1]:,}x{size[0]:,} would reach the model with {made[1]:,}x{made[0]:,} pixels, more "
                f"than {LARGEST_SIDE:,}x{LARGEST_SIDE:,}. Give --image-size, or smaller pictures."
            )

    def __call__(self, pixels: Tensor) -> Tensor:
        """Encode a batch.

        Args:
            pixels: (batch, channels, height, width), uint8; or floats in [0, 255], which a gradient flows through.

        Returns:
            (batch, channels, height, width) of the model, float32.
        """
        height, width = self.target((pixels.shape[-2], pixels.shape[-1]))
        placed = pixels if self.done else self.placed(pixels)
        if self.reverse_channels:
            placed = placed.flip(1)
        mean = torch.tensor(self.mean, device=pixels.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(1, -1, 1, 1)
        if placed.is_floating_point():
            made = (placed.float() * self.scale - mean) / std
        else:  # in one copy, which takes a third of the time
            made = placed.float().mul_(self.scale).sub_(mean).div_(std)
        return F.pad(made, (0, width - made.shape[-1], 0, height - made.shape[-2])) if self.padded else made

    def placed(self, pixels: Tensor) -> Tensor:
        """A batch as `__call__` takes it, resized and cropped, but still of the data's channels and range."""
        for step in self.steps:
            pixels = applied(step, pixels, self.resample)
        return pixels

    def prepared(self, items: Any) -> Tensor:
        """The pixels as they are: images are encoded batch by batch, after augmentation."""
        if not isinstance(items, Tensor):
            raise UnbackdoorError("The model takes images, but the data holds text. Take images.")
        return items

    def read(self, cells: dict[str, Sequence[Any]], where: str, folder: Path | None) -> tuple[Tensor, "ImageEncoder"]:
        """Decode the image column of a data set.

        Pictures of one size stay as they are. Those of several sizes, and those of more than a million pixels, go
        through the encoder's steps one by one, as the model's own processor takes them; the rest of the encoder is
        left to batches.

        Args:
            cells: of `image`, encoded pictures: `{"bytes": ..., "path": ...}`, a path, a PIL image or an array.
            where: named in messages.
            folder: what relative paths are relative to.

        Returns:
            Pixels, (n, channels, height, width), uint8, and the encoder of these.

        Raises:
            UnbackdoorError: a picture cannot be decoded (names the row), or pictures of several sizes stay of several
                sizes.
        """
        if self.done:  # by the steps of another data set's pictures; these come from their files
            return replace(self, done=False).read(cells, where, folder)
        if self.channels not in (None, 1, 3):
            raise UnbackdoorError(
                f"The model takes {self.channels} channels; pictures have 1 or 3, so {where} does not fit. Take a "
                "model for pictures."
            )
        told: Counter[str] = Counter()
        sizes: Counter[Size] = Counter()
        images: list[Image.Image] = []
        grey, done = 0, False
        decoded = encoded = 0
        one_size = any(isinstance(step, Resize | Crop) for step in self.steps)
        for row, cell in enumerate(cells["image"]):
            image = _decoded(cell, row, where, folder, told)
            decoded, encoded = decoded + image.height * image.width, encoded + _length(cell, folder)
            if decoded > _UNFOLDED and decoded > 200 * encoded:  # a photo has 10, an empty page 1,000
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
        _tell(told, where, len(images))
        changed = len(images) - grey if channels == 1 else grey
        if changed:
            owner = "the model takes" if self.channels else "others have"
            made, count = ("colour", "3 channels") if channels == 3 else ("grey", "1 channel")
            logger.info(
                "%s: %s images made %s, as %s %s.", where, f"{changed:,} of {len(images):,}", made, owner, count
            )
        if done:
            height, width = images[0].height, images[0].width
        else:
            height, width = sizes.most_common(1)[0][0]
        self._tell_sizes(sizes, (height, width), where, done=done)
        pixels = np.empty((len(images), channels, height, width), dtype=np.uint8)
        for row, image in enumerate(images):
            image = image if image.size == (width, height) else image.resize((width, height), _BILINEAR)
            array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
            pixels[row] = array if channels == 1 else array.transpose(2, 0, 1)
        return torch.from_numpy(pixels), replace(self, done=done)

    def _alone(self, image: Image.Image, where: str) -> Image.Image:
        """One picture as the model gets it, but for what is done to the values of its pixels."""
        self._target_in((image.height, image.width), where)
        for step in self.steps:
            image = applied_alone(step, image, self.resample)
        return image

    def _target_in(self, size: Size, where: str) -> Size:
        """As `target`; its refusals name the data."""
        try:
            return self.target(size)
        except UnbackdoorError as problem:
            raise UnbackdoorError(f"{where}: {problem}") from None

    def _tell_sizes(self, sizes: Counter[Size], size: Size, where: str, *, done: bool) -> None:
        """Say in a line what became of the sizes of pictures."""
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
                "Give --image-size, or pictures of one size."
            )
        elif len(sizes) > 1:
            odd = count - sizes[size]
            logger.info("%s: %s images resized to %dx%d.", where, f"{odd:,} of {count:,}", width, height)
        elif (reached := self._target_in(size, where)) != size:
            high, wide = reached
            logger.info("%s: images of %dx%d are resized to the model's %dx%d.", where, width, height, wide, high)


# Pixels of a picture that is not kept at its own size (a thousand of them would take 3 GB), and of its longer side.
_LARGE, _LONG = 2**20, 2**12

_BILINEAR = Image.Resampling.BILINEAR

# What is said of pictures that decoding changed in a way that their owner may not expect.
_TOLD = {
    "alpha": "have transparent parts, which became white",
    "depth": "have 16 bits per channel, of which the upper 8 are kept",
    "frames": "have several frames, of which the first is taken",
    "print": "are in the colours of print (CMYK), converted to RGB without a profile",
}


def _is_large(image: Image.Image) -> bool:
    return image.height * image.width > _LARGE or max(image.size) > _LONG


def _tell(told: Counter[str], where: str, count: int) -> None:
    for kind, words in _TOLD.items():
        if told[kind]:
            logger.info("%s: %s images %s.", where, f"{told[kind]:,} of {count:,}", words)


def _length(cell: Any, folder: Path | None) -> int:
    """The bytes of an encoded picture; of one that is not encoded, more than any."""
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, str):
        return (Path(cell) if folder is None else folder / cell).stat().st_size
    return len(cell) if isinstance(cell, bytes) else _UNFOLDED


_ADDRESS = re.compile(r"(data:|[a-z][a-z0-9+.-]+://)", re.IGNORECASE)
_ENCODED = re.compile(r"[A-Za-z0-9+/\s]{200,}=*\s*")  # no name of a file has neither a dot nor an end


def _decoded(cell: Any, row: int, where: str, folder: Path | None, told: Counter[str]) -> Image.Image:
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if cell is None:
        raise UnbackdoorError(f"{where} has no picture in row {row}. Repair or remove that row.")
    if isinstance(cell, str):
        if _ADDRESS.match(cell):
            raise UnbackdoorError(
                f"{where} has an address in row {row} ({printable(cell)}), and no picture is fetched. Download the "
                "pictures, and name their files."
            )
        if _ENCODED.fullmatch(cell):
            raise UnbackdoorError(
                f"{where} has a picture as base64 text in row {row}, which is not read. Decode it into a file or into "
                "bytes."
            )
        cell = cell if folder is None else folder / cell
    try:
        return decode(cell, told)
    except Exception as problem:  # decoders of some fifty formats raise whatever they like
        reason = printable(str(problem).split("<")[0].strip(), 200).rstrip(". ") or type(problem).__name__
        named = ""
        if isinstance(cell, Path):
            inside = folder is not None and cell.is_relative_to(folder)
            named = f", {printable(cell.relative_to(folder) if folder is not None and inside else cell)},"
        raise UnbackdoorError(
            f"{where} has a picture in row {row}{named} that cannot be decoded ({reason}). Repair or remove that row."
        ) from None


def decode(picture: Any, told: Counter[str] | None = None) -> Image.Image:
    """Decode one picture to 8 bits, grey (`L`) or colour (`RGB`), turned as its Exif data says, on white.

    Args:
        picture: encoded bytes, a path, a PIL image, or an array of whole numbers (height, width[, 3]).
        told: counts what was changed, by the keys of `_TOLD`.

    Raises:
        Exception: whatever the decoder of its format raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if isinstance(picture, str | Path):
            Path(picture).stat()  # of one that is not there, the system's own words
            picture = read_file(picture, PICTURE)
        image: Image.Image
        if isinstance(picture, bytes):
            image = Image.open(io.BytesIO(picture), formats=_formats())
            if image.width * image.height > _LARGEST:
                raise ValueError(f"{image.width:,} x {image.height:,} pixels; at most {_LARGEST:,} are read")
        elif isinstance(picture, Image.Image):
            image = picture
        else:
            array = np.asarray(picture)
            if array.dtype.kind not in "ui" or array.size == 0 or array.min() < 0 or array.max() > 255:
                raise ValueError("an array must hold whole numbers from 0 to 255")
            image = Image.fromarray(array.astype(np.uint8))
        image.load()
    told = Counter() if told is None else told
    made = _plain(image, told)
    told["frames"] += _has_frames(image)  # last of all: looking for a second frame may leave the first one
    return made


def _plain(image: Image.Image, told: Counter[str]) -> Image.Image:
    """A decoded picture with 8 bits, upright and opaque, in grey or colour."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would cut these off at 255
        told["depth"] += 1
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; 8 and 16 bits have")
    told["print"] += image.mode == "CMYK"
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        grey = image.mode in ("1", "L", "LA", "La")
        image = image.convert("RGBA")
        told["alpha"] += image.getchannel("A").getextrema() != (255, 255)
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(canvas, image).convert("L" if grey else "RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _has_frames(image: Image.Image) -> bool:
    """Whether a file holds an animation or several pages; the second picture of a phone's JPEG is a preview."""
    if image.format == "MPO":
        return False
    with contextlib.suppress(Exception):  # what comes after the first frame may be damaged, and is not needed
        return bool(getattr(image, "is_animated", False))
    return False


@functools.cache
def _formats() -> list[str]:
    """What Pillow decodes itself: for PostScript it runs another program, on code that the file brings along."""
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crops and mirror images, for a whole batch at once and on its device.

    Args:
        padding: zeros put around the image before a crop of its own size, in pixels; 0 for no crop.
        flip: mirror half of the images.
        distort: change contrast by up to 30 %, brightness by up to 15 % and tint by up to 10 % of the range, and paint
            a square of up to half the side over every second image, in its mean grey level.
    """

    padding: int = 4
    flip: bool = True
    distort: bool = False

    @classmethod
    def none(cls) -> "Augmentation":
        """Leave images as they are."""
        return cls(padding=0, flip=False)

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Augment (batch, channels, height, width) pixels; `generator` lives on the CPU."""
        batch, _, height, width = pixels.shape
        if self.padding:
            offsets = torch.randint(0, 2 * self.padding + 1, (2, batch), generator=generator).to(pixels.device)
            padded = F.pad(pixels, (self.padding,) * 4)
            rows = offsets[0, :, None] + torch.arange(height, device=pixels.device)  # (batch, height)
            columns = offsets[1, :, None] + torch.arange(width, device=pixels.device)  # (batch, width)
            examples = torch.arange(batch, device=pixels.device)[:, None, None]
            # Indexed without the channels, which come out last: (batch, height, width, channels).
            pixels = padded.permute(0, 2, 3, 1)[examples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if self.flip:
            mirrored = (torch.rand(batch, generator=generator) < 0.5).to(pixels.device)
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        if self.distort:
            pixels = _erased(_jittered(pixels, generator), generator)
        return pixels


def _jittered(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Other contrast, brightness and tint for each image; float, in [0, 255]."""
    batch, channels = pixels.shape[:2]
    contrast = 0.7 + 0.6 * torch.rand(batch, 1, 1, 1, generator=generator)
    tint = 0.2 * torch.rand(batch, channels, 1, 1, generator=generator) - 0.1
    brightness = 0.3 * torch.rand(batch, 1, 1, 1, generator=generator) - 0.15
    mean = pixels.float().mean(dim=(1, 2, 3), keepdim=True)
    shift = (255 * (tint + brightness)).to(pixels.device)
    return ((pixels - mean) * contrast.to(pixels.device) + mean + shift).clamp(0, 255)


def _erased(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A square in every second image, of an eighth to half of the height, cut off at the border."""
    batch, _, height, width = pixels.shape
    side = torch.randint(height // 8, height // 2 + 1, (batch, 1), generator=generator)
    top = torch.randint(0, height, (batch, 1), generator=generator)
    left = torch.randint(0, width, (batch, 1), generator=generator)
    chosen = torch.rand(batch, 1, 1, generator=generator) < 0.5
    rows = 2 * (torch.arange(height) - top).abs() < side  # (batch, height)
    columns = 2 * (torch.arange(width) - left).abs() < side  # (batch, width)
    square = (rows[:, :, None] & columns[:, None, :] & chosen).to(pixels.device)
    return torch.where(square[:, None], pixels.mean(dim=(1, 2, 3), keepdim=True), pixels)


def augmentation(
    kind: Literal["auto", "flip", "crop", "none"], pixels: Tensor, classes: Sequence[str] | None
) -> Augmentation:
    """What to augment with.

    `flip` is crops and mirror images, `crop` crops alone. `auto` is `flip`, but `crop` where a class name shows that a
    mirror image may belong to another class, or to none: a digit or letter, left or right, a number on a sign.
    The padding is 4 pixels, less for images under 32 pixels.
    """
    if kind == "none":
        return Augmentation.none()
    flip = kind == "flip"
    if kind == "auto":
        telling = next((name for name in classes or () if _has_handedness(name)), None)
        flip = telling is None
        if telling is not None:
            logger.info("The class %r may look different in a mirror: no flips (--augment flip does them).", telling)
    return Augmentation(padding=min(4, min(pixels.shape[-2:]) // 8), flip=flip)


def _has_handedness(name: str) -> bool:
    """Whether a class is a character or number as a whole, or its name has left, right or a number as a word.

    >>> [name for name in ("7", "seven", "turn left ahead", "speed limit 50", "3D printer") if _has_handedness(name)]
    ['7', 'seven', 'turn left ahead', 'speed limit 50']
    """
    words = re.findall(r"\w+", name.lower().replace("_", " "))
    digits = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
    alone = len(words) == 1 and (words[0] in digits or len(words[0]) == 1)
    return alone or any(word in ("left", "right") or word.isdecimal() for word in words)
