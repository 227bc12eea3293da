"""Images: decoding them once, bringing them into the form that a model expects, and augmenting them in batches."""

import io
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from unbackdoor._errors import UnbackdoorError

logger = logging.getLogger("unbackdoor")

Resample = Literal["nearest", "bilinear", "bicubic"]


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

    Raises:
        UnbackdoorError: mean or std is not one number, or one per channel, or std is not above 0.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    size: tuple[int, int] | None = None
    shortest_edge: int | None = None
    crop: tuple[int, int] | None = None
    resample: Resample = "bilinear"
    scale: float = 1 / 255
    channels: int | None = None

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

    def __call__(self, pixels: Tensor) -> Tensor:
        """Encode a batch.

        Args:
            pixels: (batch, channels, height, width), uint8; or floats in [0, 255], which a gradient flows through.

        Returns:
            (batch, channels, height, width) of the model, float32.
        """
        resized = self._resized(pixels)
        mean = torch.tensor(self.mean, device=pixels.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(1, -1, 1, 1)
        return (resized.float() * self.scale - mean) / std

    def _resized(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        target = self.size
        if self.shortest_edge is not None:
            edge = self.shortest_edge
            target = (edge, edge * width // height) if height < width else (edge * height // width, edge)
        if target is not None and target != (height, width):
            if self.resample == "nearest":
                pixels = F.interpolate(pixels, size=target, mode="nearest-exact")
            else:
                whole = not pixels.is_floating_point()
                for step in ((height, target[1]), target):  # Pillow resizes rows first, then columns
                    pixels = F.interpolate(
                        pixels.float(), size=step, mode=self.resample, antialias=True, align_corners=False
                    )
                    # Pillow rounds 8-bit pictures to 8 bits each time. Rounding floats would stop their gradient.
                    pixels = pixels.round_().clamp_(0, 255) if whole else pixels
        if self.crop is not None:
            top = (pixels.shape[-2] - self.crop[0]) // 2
            left = (pixels.shape[-1] - self.crop[1]) // 2
            if top < 0 or left < 0:
                pixels = F.pad(pixels, (-(min(left, 0)),) * 2 + (-(min(top, 0)),) * 2)
                top, left = max(top, 0), max(left, 0)
            pixels = pixels[..., top : top + self.crop[0], left : left + self.crop[1]]
        return pixels

    def prepared(self, items: Any) -> Tensor:
        """The pixels as they are: images are encoded batch by batch, after augmentation."""
        if not isinstance(items, Tensor):
            raise UnbackdoorError("The model takes images, but the data holds text. Take images.")
        return items

    def read(self, cells: dict[str, Sequence[Any]], where: str, folder: Path | None) -> Tensor:
        """Decode the image column of a data set.

        Args:
            cells: of `image`, encoded pictures: `{"bytes": ..., "path": ...}`, a path, a PIL image or an array.
            where: named in messages.
            folder: what relative paths are relative to.

        Returns:
            (n, channels, height, width), uint8.

        Raises:
            UnbackdoorError: a picture cannot be decoded; names the row.
        """
        images = [_decoded(cell, row, where, folder) for row, cell in enumerate(cells["image"])]
        grey = [image.mode == "L" for image in images]
        channels = self.channels or (1 if all(grey) else 3)
        if channels not in (1, 3):
            raise UnbackdoorError(
                f"The model takes {channels} channels; pictures have 1 or 3, so {where} does not fit. Take a model for "
                "pictures."
            )
        mode = "L" if channels == 1 else "RGB"
        changed = sum(is_grey != (channels == 1) for is_grey in grey)
        if changed:
            owner = "the model takes" if self.channels else "others have"
            made, count = ("colour", "3 channels") if channels == 3 else ("grey", "1 channel")
            logger.info(
                "%s: %s images made %s, as %s %s.", where, f"{changed:,} of {len(images):,}", made, owner, count
            )
        sizes = Counter(image.size for image in images)
        size = sizes.most_common(1)[0][0]
        if len(sizes) > 1:
            if self.size is not None:
                size = (self.size[1], self.size[0])
            odd = len(images) - sizes.get(size, 0)
            logger.info("%s: %s images resized to %dx%d.", where, f"{odd:,} of {len(images):,}", *size)
        pixels = np.empty((len(images), channels, size[1], size[0]), dtype=np.uint8)
        for row, image in enumerate(images):
            image = image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)
            array = np.asarray(image.convert(mode))
            pixels[row] = array if channels == 1 else array.transpose(2, 0, 1)
        target = self.size or ((self.shortest_edge,) * 2 if self.shortest_edge else None)
        if target is not None and target != pixels.shape[-2:]:
            logger.info("%s: images of %dx%d are resized to the model's %dx%d.", where, *size, target[1], target[0])
        return torch.from_numpy(pixels)  # (n, channels, height, width)


def _decoded(cell: Any, row: int, where: str, folder: Path | None) -> Image.Image:
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if cell is None:
        raise UnbackdoorError(f"{where} has no picture in row {row}. Repair or remove that row.")
    if isinstance(cell, str) and folder is not None:
        cell = folder / cell
    try:
        return decode(cell)
    except Exception as problem:  # decoders of some fifty formats raise whatever they like
        reason = str(problem).split("<")[0].strip().rstrip(".") or type(problem).__name__
        named = f", {cell.relative_to(folder)}," if isinstance(cell, Path) and folder else ""
        raise UnbackdoorError(
            f"{where} has a picture in row {row}{named} that cannot be decoded ({reason}). Repair or remove that row."
        ) from None


def decode(picture: Any) -> Image.Image:
    """Decode one picture to 8 bits, grey (`L`) or colour (`RGB`), turned as its Exif data says, on white.

    Args:
        picture: encoded bytes, a path, a PIL image, or an array of whole numbers (height, width[, 3]).

    Raises:
        Exception: whatever the decoder of its format raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if isinstance(picture, str | Path):
            picture = Path(picture).read_bytes()
        image: Image.Image
        if isinstance(picture, bytes):
            image = Image.open(io.BytesIO(picture))
        elif isinstance(picture, Image.Image):
            image = picture
        else:
            array = np.asarray(picture)
            if array.dtype.kind not in "ui" or array.size == 0 or array.min() < 0 or array.max() > 255:
                raise ValueError("an array must hold whole numbers from 0 to 255")
            image = Image.fromarray(array.astype(np.uint8))
        image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would cut these off at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; 8 and 16 bits have")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        grey = image.mode in ("1", "L", "LA", "La")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA")).convert("L" if grey else "RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


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
