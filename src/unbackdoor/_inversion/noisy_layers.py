"""Noise on the weights and biases of normalisation layers."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from unbackdoor._models.calling import Inputs


class NoisyLayers:
    """Noise on the weights and biases of normalisation layers, zero at first.

    Args:
        layers: with `weight` and `bias`.

    Attributes:
        weights: those weights and biases.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        self.weights: list[Tensor] = [getattr(layer, name) for layer in layers for name in ("weight", "bias")]
        self._before = [weight.detach().clone() for weight in self.weights]
        self._scales = [scale.abs() for scale in self._before[::2] for _ in range(2)]
        self._noise = [torch.zeros_like(scale) for scale in self._scales]

    @property
    def length(self) -> float:
        """The root of the sum of squares of the noise."""
        return math.sqrt(sum(float(part.double().square().sum()) for part in self._noise))

    @torch.no_grad()
    def put_(self, multiple: float) -> None:
        """Put a multiple of the noise on the layers."""
        for weight, start, scale, part in zip(self.weights, self._before, self._scales, self._noise, strict=True):
            weight.copy_(start + multiple * scale * part)

    def step_(self, distances: Callable[[Inputs], Tensor], parts: Sequence[Inputs], margin: Tensor) -> bool:
        """Change the noise so that the mean distance would be a little below 0 if it were linear in the noise.

        Args:
            distances: of each example from the target under the noise that is on the layers.
            parts: the examples, in parts that fit memory.
            margin: by which the distances are to fall below 0: a step that overshoots, as the multiple takes back what
                is too much.

        Returns:
            False if the distances do not depend on the noise.
        """
        for weight in self.weights:
            weight.requires_grad_(True)
        count, total = sum(map(len, parts)), 0.0
        raw = [torch.zeros_like(weight) for weight in self.weights]  # stays so if no layer leads to the scores
        for part in parts:
            loss = F.relu(distances(part) + margin).sum() / count
            total += float(loss.detach())
            if loss.requires_grad:
                of_part = torch.autograd.grad(loss, self.weights, allow_unused=True, materialize_grads=True)
                raw = [so_far + slope for so_far, slope in zip(raw, of_part, strict=True)]
        for weight in self.weights:
            weight.requires_grad_(False)
        slopes = [slope * scale for slope, scale in zip(raw, self._scales, strict=True)]
        steepness = sum(float(slope.double().square().sum()) for slope in slopes)
        for part, slope in zip(self._noise, slopes, strict=True):
            part.sub_(total / max(steepness, 1e-30) * slope)
        return steepness > 0


def normalisation_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that normalise, then scale and shift each channel: BatchNorm, LayerNorm, GroupNorm, InstanceNorm."""
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, _BatchNorm | _InstanceNorm | nn.LayerNorm | nn.GroupNorm)
        and isinstance(layer.weight, Tensor)
        and isinstance(layer.bias, Tensor)
    ]
