"""Hooks that observe layers, and blocks that restore weights and statistics at their end."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_DROPPING = re.compile("Drop|StochasticDepth")


@contextmanager
def weights_kept(weights: Iterable[Tensor]) -> Iterator[None]:
    """Undo in place, when the block ends, all changes of the weights while it ran."""
    before = [(weight, weight.detach().clone()) for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, kept in before:
                weight.copy_(kept)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """While the block runs, nothing is dropped at random in train mode either.

    That is each module of dropout's kind (`p`, also of torchvision's `StochasticDepth`), and each rate with `drop` in
    its name, such as timm's `drop_prob` and the `attention_dropout` of transformers. A rate that a forward pass has as
    a constant stays.
    """
    rates = [
        (module, name, rate)
        for module in model.modules()
        for name, rate in vars(module).items()
        if isinstance(rate, float) and ("drop" in name or (name == "p" and _DROPPING.search(type(module).__name__)))
    ]
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """While the block runs, BatchNorm normalises as in its mode, but does not update its running statistics."""
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
    """Remove hooks when the block ends, also after an error."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def watching(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Keep a layer's input in the latest forward pass as the only entry of a list; a gradient flows through it."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen[:] = arguments[:1]

    hook = layer.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()
