"""Gradient checkpointing: blocks that keep no activations for the backward pass, and are computed again there."""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from unbackdoor._errors import UnbackdoorError

_AGAIN = functools.partial(checkpoint, use_reentrant=False)  # the other form passes over frozen embeddings


def recomputed_(model: nn.Module) -> list[Any]:
    """Let the blocks of a model, in train mode, compute again what their backward pass needs; a copy does so, too.

    The gradients are the same bit for bit, dropout included. Only the inputs of blocks stay in memory, for one more
    forward pass.

    Chen, Xu, Zhang and Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016,
    https://arxiv.org/abs/1604.06174

    Args:
        model: a model of transformers, or an adapter on one; changed in place.

    Returns:
        the modules that did not do so before.

    Raises:
        UnbackdoorError: its blocks cannot, or BatchNorm would count each batch twice.
    """
    places: list[Any] = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if not places or any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise UnbackdoorError(
            "`gradient_checkpointing` needs a model of transformers whose blocks can be computed again, and no "
            f"BatchNorm in it; {type(model).__name__} is another one. Leave it out."
        )
    before = [module for module in places if not module.gradient_checkpointing]
    for module in before:
        module.gradient_checkpointing, module._gradient_checkpointing_func = True, _AGAIN
    return before


def kept_(modules: Iterable[Any]) -> None:
    """Let modules keep their activations again, those of `recomputed_` and of its copies; others are left alone."""
    for module in modules:
        if vars(module).get("_gradient_checkpointing_func") is _AGAIN:
            module.gradient_checkpointing = False
            del module._gradient_checkpointing_func


@contextmanager
def recomputing(*models: nn.Module) -> Iterator[None]:
    """While the block runs, models compute their blocks again; see `recomputed_`."""
    changed: list[Any] = []
    try:
        for model in models:
            changed += recomputed_(model)
        yield
    finally:
        kept_(changed)
