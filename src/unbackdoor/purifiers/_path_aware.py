"""Path-aware gradients: PAM takes them at a point on the way back to the suspect."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from unbackdoor._models.hooks import weights_kept


@contextmanager
def stepped_back(weights: Sequence[Tensor], suspect: Sequence[Tensor], rho: float) -> Iterator[None]:
    """While the block runs, weights are a step of length rho on the way back to the suspect's.

    Args:
        weights: the model's weights, moved in place and back again.
        suspect: the suspect's weights in the same order.
        rho: length of the step, at least 0; if it is 0, or the weights are the suspect's, nothing moves.
    """
    if rho == 0:
        yield
        return
    with weights_kept(weights):
        with torch.no_grad():
            way = [start - weight for start, weight in zip(suspect, weights, strict=True)]
            step = rho / (torch.stack([part.norm() for part in way]).norm() + 1e-12)
            for weight, part in zip(weights, way, strict=True):
                weight.add_(part * step)
        yield
