"""The steps by which image processors change the size of pictures: planned for any size, done to whole batches."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Resize:
    """Resizes to one size, whatever the shape was."""

    size: Size

    def target(self, size: Size) -> Size:
        """The size that a picture of some size is resized to."""
        return self.size


@dataclass(frozen=True)
class ResizeEdge:
    """Resizes the shorter side to some pixels and keeps the shape.

    Args:
        shortest: pixels of the shorter side.
        longest: most pixels of the longer side; None for no bound.
        multiple: both sides are rounded up to multiples of this.
    """

    shortest: int
    longest: int | None = None
    multiple: int = 1

    def target(self, size: Size) -> Size:
        """The size that a picture of some size is resized to."""
        short, long = sorted(size)
        edge, exact = self.shortest, float(self.shortest)
        if self.longest is not None and long / short * edge > self.longest:
            exact = self.longest * float(short) / long
            edge = round(exact)
        other = long if edge == short else int(exact * long / short)
        height, width = (edge, other) if size[0] <= size[1] else (other, edge)
        return math.ceil(height / self.multiple) * self.multiple, math.ceil(width / self.multiple) * self.multiple


@dataclass(frozen=True)
class ResizeWithin:
    """Resizes to the largest size that fits into a height and a width, and keeps the shape."""

    bound: Size

    def target(self, size: Size) -> Size:
        """The size that a picture of some size is resized to."""
        scale = min(self.bound[0] / size[0], self.bound[1] / size[1])
        return int(size[0] * scale), int(size[1] * scale)


@dataclass(frozen=True)
class Crop:
    """Crops to the middle of a picture; a smaller one gets zeros around it."""

    size: Size

    def target(self, size: Size) -> Size:
        """The size that a picture of some size is cropped to."""
        return self.size


@dataclass(frozen=True)
class CropShare:
    """Crops to the middle of a picture; the sides are shares of its shorter side.

    Args:
        share: (height, width), each as a share of the shorter side.
    """

    share: tuple[float, float]

    def target(self, size: Size) -> Size:
        """The size that a picture of some size is cropped to."""
        return int(self.share[0] * min(size)), int(self.share[1] * min(size))


Step = Resize | ResizeEdge | ResizeWithin | Crop | CropShare


def applied(step: Step, pixels: Tensor, resample: Resample) -> Tensor:
    """Take one step with a batch of pictures.

    Args:
        step: the step to take.
        pixels: (batch, channels, height, width), uint8, or floats in [0, 255].
        resample: filter for resizing.
    """
    size = step.target((pixels.shape[-2], pixels.shape[-1]))
    return cropped(pixels, size) if isinstance(step, Crop | CropShare) else resized(pixels, size, resample)


def applied_alone(step: Step, image: Image.Image, resample: Resample) -> Image.Image:
    """Take one step with a single picture; equal to the last bit to `applied` on whole numbers."""
    height, width = step.target((image.height, image.width))
    if isinstance(step, Crop | CropShare):
        top, left = (image.height - height) // 2, (image.width - width) // 2
        return image.crop((left, top, left + width, top + height))  # zeros stand outside
    return image.resize((width, height), Image.Resampling[resample.upper()])


def cropped(pixels: Tensor, size: Size) -> Tensor:
    """The middle of pictures, with zeros around those that are smaller."""
    top = (pixels.shape[-2] - size[0]) // 2
    left = (pixels.shape[-1] - size[1]) // 2
    if top < 0 or left < 0:
        pixels = F.pad(pixels, (-(min(left, 0)),) * 2 + (-(min(top, 0)),) * 2)
        top, left = max(top, 0), max(left, 0)
    return pixels[..., top : top + size[0], left : left + size[1]]


def resized(pixels: Tensor, size: Size, resample: Resample) -> Tensor:
    """Resize as Pillow does.

    Args:
        pixels: (batch, channels, height, width). Whole numbers are resized by Pillow itself, so that they come out as
            transformers' processors make them, to the last bit. Floats go through the same filters without Pillow's
            rounding to 8 bits, which would stop their gradient.
        size: size to resize to.
        resample: the filter; antialiased if pictures shrink, except for `nearest`.
    """
    before = (pixels.shape[-2], pixels.shape[-1])
    if before == size:
        return pixels
    if not pixels.is_floating_point():
        return _by_pillow(pixels, size, resample)
    rows, columns = (
        torch.from_numpy(_weights(old, new, resample)).to(pixels.device, pixels.dtype)
        for old, new in zip(before, size, strict=True)
    )
    with torch.autocast(pixels.device.type, enabled=False):  # bfloat16 has only the eight bits of a pixel
        return rows.mT @ (pixels @ columns)


def _by_pillow(pixels: Tensor, size: Size, resample: Resample) -> Tensor:
    """Channel by channel: Pillow treats each on its own, and there may be any number of them."""
    planes = pixels.to("cpu", torch.uint8).reshape(-1, *pixels.shape[-2:]).numpy()
    resized_planes = np.empty((len(planes), *size), dtype=np.uint8)

    def resize(part: np.ndarray) -> None:
        for at in part:
            image = Image.fromarray(planes[at]).resize(size[::-1], Image.Resampling[resample.upper()])
            resized_planes[at] = np.asarray(image)

    workers = min(torch.get_num_threads(), len(planes))
    parts = np.array_split(np.arange(len(planes)), max(workers, 1))
    if workers > 1:  # Pillow lets go of Python's lock while it resizes
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(resize, parts))
    else:
        resize(parts[0])
    return torch.from_numpy(resized_planes).view(*pixels.shape[:-2], *size).to(pixels.device)


@lru_cache(maxsize=16)
def _weights(before: int, after: int, resample: Resample) -> np.ndarray:
    """Returns the weight of each pixel of a line in each pixel of the resized line, (before, after); columns sum to 1.

    They are read off lines with a single pixel of 1, resized by Pillow.
    """
    lines = Image.fromarray(np.eye(before, dtype=np.float32))
    return np.array(lines.resize((after, before), Image.Resampling[resample.upper()]))
