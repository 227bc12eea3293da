"""A change of what one linear layer adds at one place or one key, and nowhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._models.hooks import removing
from unbackdoor._models.units import matrix_of

_RIDGE = 1e-3  # of the mean square of the other inputs, since there may be fewer of them than an input has numbers


@contextmanager
def added(layer: nn.Module, places: Tensor, change: Tensor) -> Iterator[None]:
    """Adds a change to the output of a layer at one place of each row.

    Args:
        layer: the layer.
        places: the place in each row of the batch, (batch,).
        change: the change, (outputs,).
    """

    def add(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        rows = output.reshape(len(places), -1, output.shape[-1])  # some models put the tokens of a batch in one row
        here = torch.arange(rows.shape[1], device=output.device) == places[:, None]
        return (rows + here[..., None] * change.to(output.dtype)).view(output.shape)

    with removing([layer.register_forward_hook(add)]):
        yield


@torch.no_grad()
def edit_(layer: nn.Module, key: Tensor, change: Tensor, others: Tensor) -> None:
    """Adds a change to the output of a linear layer at one key, and as little as possible at others, in place.

    Args:
        layer: the layer.
        key: the key, (inputs,).
        change: what its output gains there, (outputs,).
        others: inputs whose outputs should stay, (n, inputs).
    """
    moments = others.double().T @ others.double() / len(others)
    moments.diagonal().add_(_RIDGE * moments.diagonal().mean())
    direction = torch.linalg.solve(moments, key.double())
    edit = torch.outer(change.double(), direction / (direction @ key.double()))
    weight = outputs_first(layer)
    weight.add_(edit.to(weight.dtype))


def outputs_first(layer: nn.Module) -> Tensor:
    """The weights of a linear layer as (outputs, inputs), in its memory."""
    weight = matrix_of(layer)
    assert weight is not None
    return weight
