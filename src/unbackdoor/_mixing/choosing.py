"""Masks of the coordinates that keep the suspect's value, chosen by what the weights or the clean examples say."""

import torch
from torch import Tensor


def least_changed(suspect: Tensor, base: Tensor, share: float) -> Tensor:
    """Returns a mask of the coordinates of a tensor that moved least from the base, in its shape, bool.

    Args:
        suspect: tensor of the suspect.
        base: its counterpart, of the same shape.
        share: the part of the coordinates that is chosen, 0 to 1.
    """
    return _lowest((suspect - base).abs().flatten(), share).view(suspect.shape)


def most_active(weight: Tensor, activity: Tensor, share: float) -> Tensor:
    """Returns a mask of the units of a layer that answer most, one decision for each row of its tensor, bool.

    Args:
        weight: weight or bias, (units, ...).
        activity: mean answer of each unit to clean examples, (units,).
        share: the part of the units that is chosen, 0 to 1.
    """
    return _lowest(-activity, share).view(-1, *[1] * (weight.ndim - 1)).expand(weight.shape)


def _lowest(scores: Tensor, share: float) -> Tensor:
    """Returns which of (n,) scores are among the lowest `share` of them, bool."""
    chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    chosen[scores.argsort(stable=True)[: round(share * len(scores))]] = True
    return chosen
