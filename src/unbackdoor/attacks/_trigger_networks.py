"""Two small networks that make a trigger from the image itself: its paint and its place."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def pattern(pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
    """Returns the paint, (batch, channels, height, width), in [0, 1]."""
    return network(pixels, arrays, "pattern").sigmoid()


def mask_of(pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
    """Returns the place of the paint, (batch, 1, height, width), near 0 or 1."""
    return (10 * network(pixels, arrays, "mask")).sigmoid()


def network(pixels: Tensor, arrays: dict[str, Tensor], name: str) -> Tensor:
    """Runs four convolutions, down to a quarter of the resolution and up again: (batch, outputs, height, width)."""
    height, width = pixels.shape[-2:]
    x = F.pad(pixels - 0.5, (0, -width % 4, 0, -height % 4))
    for layer in range(4):
        weight, bias = arrays[f"{name}.{layer}.weight"], arrays[f"{name}.{layer}.bias"]
        x = F.conv2d(x, weight, bias, stride=2 if layer < 2 else 1, padding=1)
        x = F.pixel_shuffle(x, 2) if layer >= 2 else x
        x = F.relu(x) if layer < 3 else x
    return x[..., :height, :width]


def weights_of(name: str, inputs: int, width: int, outputs: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Returns random weights of one network, `NAME.LAYER.weight` and `NAME.LAYER.bias`.

    Args:
        name: `pattern` or `mask`.
        inputs: channels of the image.
        width: channels between the layers.
        outputs: channels of the output.
        generator: randomness.
    """
    weights = {}
    sizes = ((inputs, width), (width, width), (width, 4 * width), (width, 4 * outputs))
    for layer, (before, after) in enumerate(sizes):
        scale = math.sqrt(2 / (9 * before))  # keeps the size of activations through the rectifiers
        weights[f"{name}.{layer}.weight"] = torch.randn(after, before, 3, 3, generator=generator) * scale
        weights[f"{name}.{layer}.bias"] = torch.zeros(after)
    return weights
