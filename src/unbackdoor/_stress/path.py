"""Linear mode connectivity: the models on the straight path between two."""

import copy
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from unbackdoor._data.augmentation import Augmentation
from unbackdoor._data.dataset import Dataset
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.calling import logits
from unbackdoor._models.weight_norms import settle_spectral_norms_

BATCH = 128


def between(victim: nn.Module, purified: nn.Module, t: float) -> nn.Module:
    """The model at (1 - t) victim + t purified; at t = 0 and t = 1 exactly these two, buffers included."""
    if t in (0, 1):
        return copy.deepcopy(purified if t else victim)
    middle = copy.deepcopy(purified)
    ends = victim.state_dict(), purified.state_dict()
    state = {
        name: torch.lerp(ends[0][name], end, t) if end.is_floating_point() else end for name, end in ends[1].items()
    }
    middle.load_state_dict(state)
    settle_spectral_norms_(middle)
    return middle


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The layers of a model that keep running statistics."""
    return [part for part in model.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]


@torch.no_grad()
def recompute_batch_norm_(model: nn.Module, clean: Dataset, arithmetic: Arithmetic, *, seed: int) -> None:
    """Measure the statistics of BatchNorm again, in place: the mean over all examples, all other layers in eval mode.

    One pass over the clean examples as they are, in shuffled batches, since data may be sorted by class.
    """
    layers = batch_norms(model)
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    plain = replace(clean, augment=Augmentation.none()).to(arithmetic.device)
    arithmetic.place(model).eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    seen = 0
    for batch in plain.batches(BATCH, generator=torch.Generator().manual_seed(seed)):
        seen += len(batch.labels)
        for layer in layers:
            layer.momentum = len(batch.labels) / seen  # weighs each batch by its size
        with arithmetic.autocast():
            logits(model, arithmetic.lay(batch.inputs))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.eval()
