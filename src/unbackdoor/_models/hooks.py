"""Watching layers with hooks, and putting back what running a model changes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def weights_kept(weights: Iterable[Tensor]) -> Iterator[None]:
    """Whatever happens to the weights while the block runs is taken back, in place."""
    before = [(weight, weight.detach().clone()) for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, kept in before:
                weight.copy_(kept)


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalises as it does in its mode, but learns no running statistics."""
    learning = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    for module in learning:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in learning:
            module.track_running_stats = True


@contextmanager
def removing(hooks: list[RemovableHandle]) -> Iterator[None]:
    """Take hooks off when the block ends, however it ends."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def watching(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What a layer is given in the latest forward pass, the one entry of a list; a gradient flows through it."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen[:] = given[:1]

    hook = layer.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()
