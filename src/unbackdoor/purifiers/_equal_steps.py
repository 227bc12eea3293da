"""One learning rate for filters and features of any length."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unbackdoor._models.calling import Inputs, evaluating
from unbackdoor._models.head import Head, features
from unbackdoor._models.hooks import removing

LONGEST_INPUT = 10.0  # root mean square length of the head's input, from which on its steps are shortened


@contextmanager
def equal_steps(model: nn.Module, head: Head, inputs: Inputs) -> Iterator[None]:
    """While the block runs, gradients are scaled so that a learning rate of SGD means the same angle in every network.

    A filter in front of a normalisation computes the same at any length l, and its gradient is proportional to 1 / l,
    so that a step turns it by an angle proportional to 1 / l^2. So the gradient of each weight of the body is
    multiplied by the mean of l^2 over its filters (rows, of a linear layer), and the rate means the same as if they had
    the length 1. The head's output changes by a step in proportion to the squared length of its input; if its mean is
    over `LONGEST_INPUT`^2, the head's gradient is divided by how many times it is. Weights and biases of
    normalisations, and other vectors, keep their gradients. Adam does not depend on the scale of a gradient, so for it
    nothing changes.

    Args:
        model: any classifier; its weights are not changed.
        head: its last linear layer.
        inputs: one batch of model inputs.
    """
    own = {id(parameter) for parameter in head.layer.parameters()}
    with torch.no_grad(), evaluating(model):
        squared = float(features(model, inputs, head).double().square().sum(dim=-1).mean())
    shortened = min(1.0, LONGEST_INPUT**2 / squared) if squared > 0 else 1.0
    factors = [
        (parameter, shortened if id(parameter) in own else _squared_length(parameter))
        for parameter in model.parameters()
        if parameter.requires_grad and (id(parameter) in own or parameter.ndim > 1)
    ]
    with removing([parameter.register_hook(_times(factor)) for parameter, factor in factors]):
        yield


def _squared_length(weight: Tensor) -> float:
    """Returns the mean squared length of the filters, or rows, of a weight, (outputs, ...)."""
    return float(weight.detach().flatten(1).square().sum(dim=1).mean())


def _times(factor: float) -> Callable[[Tensor], Tensor]:
    """Returns a function that multiplies a gradient."""
    return lambda gradient: gradient * factor
