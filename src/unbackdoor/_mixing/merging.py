"""Merging two models that were tuned from one base: by the signs of their changes, or by depth."""

import re

import torch
from torch import Tensor

_ATTENTION = (0.0, 0.5, 0.3, 0.7, 1.0)  # from the first block to the last


def sign_elected(base: Tensor, models: list[Tensor], density: float) -> Tensor:
    """Returns the base with the changes on which models agree, in float32 or better, rounded once.

    Of each model's change only the largest numbers stay. Where the remaining changes differ in sign, the sign of their
    sum is elected, and each number is the mean of the changes with that sign.

    Yadav, Tam, Choshen, Raffel and Bansal, "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023,
    https://arxiv.org/abs/2306.01708

    Args:
        base: a tensor of floating-point numbers.
        models: the tensors of the models, of the same shape.
        density: share of the numbers of each change that stay, 0 to 1.
    """
    exact = torch.float64 if base.dtype == torch.float64 else torch.float32
    changes = [_largest(model.to(exact) - base.to(exact), density) for model in models]
    return elected(base.to(exact), changes).to(base.dtype)


def elected(base: Tensor, changes: list[Tensor]) -> Tensor:
    """Returns the base with the changes on which models agree, of those that stay; see `sign_elected`."""
    stacked = torch.stack(changes)
    agreeing = stacked * (stacked.sum(dim=0).sign() == stacked.sign())
    return base + agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp(min=1)


def _largest(change: Tensor, density: float) -> Tensor:
    """The largest numbers of a change, by magnitude; the others become 0."""
    kept = round(density * change.numel())
    flat = torch.zeros_like(change).flatten()
    places = change.abs().flatten().argsort(descending=True, stable=True)[:kept]
    flat[places] = change.flatten()[places]
    return flat.view(change.shape)


def share_at(name: str, blocks: int) -> float:
    """Returns the share of the other model in a tensor whose depth decides, 0 to 1.

    In attention it is 0, 0.5, 0.3, 0.7, 1 from the first block to the last, in feed-forward parts one minus that, each
    linear in between; all other tensors are shared equally.

    Args:
        name: name of the tensor.
        blocks: number of the model's blocks.
    """
    block = re.search(r"\.(\d+)\.", name)
    part = re.search(r"\b(attn|self_attn|attention|mlp|feed_forward)\.", name)
    if block is None or part is None:
        return 0.5
    curve = _ATTENTION if "att" in part[1] else tuple(1 - share for share in _ATTENTION)
    place = min(int(block[1]) / max(blocks - 1, 1), 1.0) * (len(curve) - 1)
    low = min(int(place), len(curve) - 2)
    return curve[low] + (place - low) * (curve[low + 1] - curve[low])
