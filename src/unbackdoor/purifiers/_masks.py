"""Masks of channels, as several purifiers learn them, and pruning below a threshold of a mask."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.units import norms
from unbackdoor._purification.run import Run
from unbackdoor.purifiers._pruning import as_far_as_accurate_, silence_, still_accurate


class Scale(nn.Module):
    """A parametrization that multiplies the stored value by a mask plus a noise."""

    def __init__(self, stored: Tensor) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.ones_like(stored))
        self.noise = nn.Parameter(torch.zeros_like(stored))

    def forward(self, stored: Tensor) -> Tensor:
        """Returns the stored value, scaled channel by channel."""
        return stored * (self.mask + self.noise)


def scaled_(layers: Iterable[nn.Module], name: str) -> list[Scale]:
    """Put a mask and a noise on a parameter of each layer; for copies that are thrown away afterwards."""
    scales = []
    for layer in layers:
        scale = Scale(getattr(layer, name).detach())
        parametrize.register_parametrization(layer, name, scale)
        scales.append(scale)
    return scales


class ByMask(Protocol):
    """A method that learns a mask and prunes below a threshold of it.

    Attributes:
        tolerance: how much accuracy on held-out clean examples may fall by pruning.
        threshold: channels with a mask of at most this are pruned; None searches it.
    """

    @property
    def tolerance(self) -> float:
        """Clean accuracy that may be lost."""

    @property
    def threshold(self) -> float | None:
        """Channels with a mask of at most this are pruned; None searches it."""


def prune_below_(
    method: ByMask,
    model: nn.Module,
    clean: Dataset,
    run: Run,
    learn: Callable[[nn.Module, Dataset, Run], Sequence[Tensor]],
) -> None:
    """Learn a mask and prune channels by it, in place, at the largest threshold that clean accuracy allows.

    Thresholds go up from 0 to 0.95 by 0.05, until accuracy on a fifth of the clean examples, which the mask has not
    seen, falls by more than the tolerance. With a threshold given, the mask is learned on all of them. As in the papers
    of both methods that learn masks, a channel's weight becomes zero and its bias stays.

    Args:
        method: named in the note.
        model: a network with BatchNorm layers, changed in place.
        clean: examples for the mask and for the choice of the threshold.
        run: measures accuracy and takes notes.
        learn: function of model, clean examples and run that returns the mask of each BatchNorm in module order,
            (channels,) in [0, 1], and leaves the model unchanged.

    Raises:
        UnbackdoorError: there is no BatchNorm, or a mask is not finite.
    """
    layers, name = list(norms(model, method).values()), type(method).__name__
    seen, held = (clean, clean) if method.threshold is not None else run.hold_out(clean)
    masks = learn(model, seen, run)

    def prune_(threshold: float) -> None:
        for layer, mask in zip(layers, masks, strict=True):
            silence_(layer, mask <= threshold, bias=False)

    if not all(mask.isfinite().all() for mask in masks):
        raise UnbackdoorError(f"{name} learned a mask with non-finite values. Lower its rates.")
    lowest = min(float(mask.min()) for mask in masks)
    if method.threshold is None:
        thresholds = [step / 20 for step in range(20)]
        kept = as_far_as_accurate_(
            [layer.weight for layer in layers],
            [partial(prune_, threshold) for threshold in thresholds],
            still_accurate(model, held, run, method.tolerance),
        )
        threshold = thresholds[kept - 1] if kept else -1.0
        way_out = f"clean accuracy on {len(held)} held-out examples allows pruning none. Raise its `tolerance`."
        if lowest > thresholds[-1]:
            way_out = f"no mask fell to {thresholds[-1]:g} or below. Learn it for longer, or at a higher rate."
    else:
        threshold = method.threshold
        prune_(threshold)
        way_out = "none has so low a mask. Raise its `threshold`."
    total = sum(map(len, masks))
    pruned = sum(int((mask <= threshold).sum()) for mask in masks)
    if pruned:
        run.note(f"{name} pruned {pruned} of {total} channels, those with a mask of at most {threshold:g}.")
    else:
        run.warn(f"{name} pruned nothing of {total} channels: {way_out}")
