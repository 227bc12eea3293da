"""Images: decoding them once, bringing them into the form that a model expects, and augmenting them in batches."""

import io
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unbackdoor._errors import UnbackdoorError

logger = logging.getLogger("unbackdoor")

Resample = Literal["nearest", "bilinear", "bicubic"]

# Pillow's numbers for filters, as they stand in preprocessor_config.json. Lanczos (1) has no counterpart in torch.
_FILTERS: dict[int, Resample] = {0: "nearest", 2: "bilinear", 3: "bicubic"}

# Image processors whose steps are resize, centre crop, rescale, normalise, in that order.
_PROCESSORS = {"ViT", "ConvNext", "DeiT", "Bit", "Beit", "CLIP"}


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
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    size: tuple[int, int] | None = None
    shortest_edge: int | None = None
    crop: tuple[int, int] | None = None
    resample: Resample = "bilinear"
    scale: float = 1 / 255
    channels: int | None = None

    columns = ("image",)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Encode a batch.

        Args:
            pixels: (batch, channels, height, width), uint8.

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
                pixels = F.interpolate(
                    pixels.float(), size=target, mode=self.resample, antialias=True, align_corners=False
                )
                pixels = pixels.round_().clamp_(0, 255)  # Pillow resizes 8-bit pictures to 8 bits
        if self.crop is not None:
            top = (pixels.shape[-2] - self.crop[0]) // 2
            left = (pixels.shape[-1] - self.crop[1]) // 2
            if top < 0 or left < 0:
                pixels = F.pad(pixels, (-(min(left, 0)),) * 2 + (-(min(top, 0)),) * 2)
                top, left = max(top, 0), max(left, 0)
            pixels = pixels[..., top : top + self.crop[0], left : left + self.crop[1]]
        return pixels

    def read(self, cells: Sequence[Any], where: str, folder: Path | None) -> Tensor:
        """Decode the image column of a data set.

        Args:
            cells: encoded pictures: `{"bytes": ..., "path": ...}`, a path, a PIL image or an array.
            where: named in messages.
            folder: what relative paths are relative to.

        Returns:
            (n, channels, height, width), uint8.

        Raises:
            UnbackdoorError: a picture cannot be decoded; names the row.
        """
        images = [_decoded(cell, row, where, folder) for row, cell in enumerate(cells)]
        grey = [image.mode in ("1", "L", "LA", "I", "F", "I;16") for image in images]
        channels = self.channels or (1 if all(grey) else 3)
        if channels not in (1, 3):
            raise UnbackdoorError(
                f"The model takes {channels} channels; pictures have 1 or 3, so {where} does not fit."
            )
        mode = "L" if channels == 1 else "RGB"
        changed = sum(is_grey != (channels == 1) for is_grey in grey)
        if changed:
            kind = "grey images were made colour" if channels == 3 else "colour images were made grey"
            logger.info("%s: %s %s, as the model takes %s channel(s).", where, f"{changed:,}", kind, channels)
        sizes = Counter(image.size for image in images)
        size = sizes.most_common(1)[0][0]
        if len(sizes) > 1:
            if self.size is not None:
                size = (self.size[1], self.size[0])
            odd = len(images) - sizes.get(size, 0)
            logger.info("%s: %s images of other sizes were resized to %dx%d.", where, f"{odd:,}", *size)
        arrays = [
            np.asarray((image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)).convert(mode))
            for image in images
        ]
        pixels = torch.from_numpy(np.stack(arrays))
        pixels = pixels.unsqueeze(1) if channels == 1 else pixels.permute(0, 3, 1, 2).contiguous()
        target = self.size or ((self.shortest_edge,) * 2 if self.shortest_edge else None)
        if target is not None and target != tuple(pixels.shape[-2:]):
            logger.info("%s: images of %dx%d are resized to the model's %dx%d.", where, *size, target[1], target[0])
        return pixels  # (n, channels, height, width)


def _decoded(cell: Any, row: int, where: str, folder: Path | None) -> Image.Image:
    try:
        if isinstance(cell, dict):
            cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
        image: Image.Image
        if isinstance(cell, bytes):
            image = Image.open(io.BytesIO(cell))
        elif isinstance(cell, str):
            path = Path(cell)
            image = Image.open(path if folder is None or path.is_absolute() else folder / path)
        elif isinstance(cell, Image.Image):
            image = cell
        else:
            image = Image.fromarray(np.asarray(cell, dtype=np.uint8))
        image.load()
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as problem:
        reason = str(problem).split("<")[0].strip() or type(problem).__name__
        raise UnbackdoorError(
            f"{where} has a picture in row {row} that cannot be decoded ({reason}). Repair or remove that row."
        ) from None
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA")).convert("L" if image.mode == "LA" else "RGB")
    return image


def encoder_of(preprocessor: dict[str, Any], channels: int | None, where: str) -> ImageEncoder:
    """The encoder that does what a Hugging Face `preprocessor_config.json` asks for.

    Raises:
        UnbackdoorError: the processor takes steps that are not known here.
    """
    kind = str(preprocessor.get("image_processor_type", preprocessor.get("feature_extractor_type", "")))
    family = kind
    for suffix in ("FeatureExtractor", "ImageProcessorFast", "ImageProcessorPil", "ImageProcessor"):
        family = family.removesuffix(suffix)
    filter_ = int(preprocessor.get("resample", 2))
    if family not in _PROCESSORS or filter_ not in _FILTERS or preprocessor.get("do_pad"):
        raise UnbackdoorError(
            f"{where} asks for the processor {kind or 'without a name'}, which is not known here; known are "
            f"{', '.join(sorted(_PROCESSORS))}. Give --mean, --std and --image-size instead."
        )
    size = preprocessor.get("size") or {}
    size = {"height": size, "width": size} if isinstance(size, int) and family != "ConvNext" else size
    size = {"shortest_edge": size} if isinstance(size, int) else size
    exact: tuple[int, int] | None = None
    shortest: int | None = None
    crop: tuple[int, int] | None = None
    if preprocessor.get("do_resize", True):
        if "shortest_edge" in size:
            shortest = int(size["shortest_edge"])
            if family == "ConvNext":
                exact, shortest, crop = _convnext(shortest, float(preprocessor.get("crop_pct") or 224 / 256))
        elif "height" in size:
            exact = (int(size["height"]), int(size["width"]))
    if preprocessor.get("do_center_crop"):
        crop_size = preprocessor.get("crop_size") or size
        crop_size = {"height": crop_size, "width": crop_size} if isinstance(crop_size, int) else crop_size
        crop = (int(crop_size["height"]), int(crop_size["width"]))
    normalise = preprocessor.get("do_normalize", True)
    mean, std = preprocessor.get("image_mean") or [0.5], preprocessor.get("image_std") or [0.5]
    scale = float(preprocessor.get("rescale_factor", 1 / 255)) if preprocessor.get("do_rescale", True) else 1.0
    return ImageEncoder(
        mean=tuple(mean) if normalise else (0.0,),
        std=tuple(std) if normalise else (1.0,),
        size=exact,
        shortest_edge=shortest,
        crop=crop,
        resample=_FILTERS[filter_],
        scale=scale,
        channels=channels,
    )


def _convnext(edge: int, crop_share: float) -> tuple[tuple[int, int] | None, int | None, tuple[int, int] | None]:
    """ConvNeXt resizes a little larger and crops below 384 pixels, and warps to the exact size from there on."""
    if edge >= 384:
        return (edge, edge), None, None
    return None, int(edge / crop_share), (edge, edge)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crops and mirror images, for a whole batch at once and on its device.

    Args:
        padding: zeros put around the image before a crop of its own size, in pixels; 0 for no crop.
        flip: mirror half of the images.
    """

    padding: int = 4
    flip: bool = True

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
        return pixels


def augmentation(
    kind: Literal["auto", "flip", "crop", "none"], pixels: Tensor, classes: Sequence[str] | None
) -> Augmentation:
    """What to augment with.

    `flip` is crops and mirror images, `crop` crops alone. `auto` is `flip`, but `crop` where the class names show
    that a mirror image may belong to another class (digits, letters, left and right, traffic signs with numbers).
    The padding is 4 pixels, less for images under 32 pixels.
    """
    if kind == "none":
        return Augmentation.none()
    flip = kind == "flip"
    if kind == "auto":
        flip = not any(_has_handedness(name) for name in classes or ())
        if not flip:
            logger.info("The class names tell left from right, so images are not mirrored (--augment flip does it).")
    return Augmentation(padding=min(4, min(pixels.shape[-2:]) // 8), flip=flip)


def _has_handedness(name: str) -> bool:
    words = name.lower().replace("_", " ").replace("-", " ").split()
    digits = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
    return any(word in ("left", "right") or word in digits or len(word) == 1 for word in words) or name.isdigit()
