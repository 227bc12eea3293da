"""Pruning in stages, as several purifiers do it, and how far clean accuracy allows it to go."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unbackdoor._data.dataset import Dataset
from unbackdoor._purification.run import Run


@torch.no_grad()
def as_far_as_accurate_(
    parameters: Sequence[Tensor], stages: Iterable[Callable[[], None]], accurate: Callable[[], bool]
) -> int:
    """Prune in stages, from mild to severe, up to the last one after which the model is still accurate.

    Args:
        parameters: all that a stage may change.
        stages: each changes some of them in place.
        accurate: asked after each stage.

    Returns:
        how many stages were kept.
    """
    kept = 0
    for stage in stages:
        before = [parameter.clone() for parameter in parameters]
        stage()
        if not accurate():
            for parameter, earlier in zip(parameters, before, strict=True):
                parameter.copy_(earlier)
            break
        kept += 1
    return kept


def still_accurate(model: nn.Module, held: Dataset, run: Run, tolerance: float) -> Callable[[], bool]:
    """Asks whether accuracy on held-out examples has fallen by no more than a tolerance since this call."""
    floor = run.accuracy(model, held).value - tolerance
    return lambda: run.accuracy(model, held).value >= floor


@torch.no_grad()
def silence_(norm: _BatchNorm, dead: Tensor, *, bias: bool = True) -> None:
    """Fold away channels of a BatchNorm, in place: weight to zero, and where `bias`, what they add regardless.

    Args:
        norm: with a weight.
        dead: which channels, (channels,), bool.
        bias: also zero the bias; else a channel becomes constant.
    """
    norm.weight[dead] = 0
    if bias:
        norm.bias[dead] = 0
