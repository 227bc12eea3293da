"""A head at one length, whatever the scale of its features, and a head turned by an angle."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unbackdoor._models.calling import Inputs, evaluating, logits
from unbackdoor._models.head import Head, features
from unbackdoor._models.hooks import removing
from unbackdoor._models.weight_norms import check_weight_is_own

ROW = math.sqrt(3.1)  # root mean square length of the head's rows in its own units


def centred(weight: Tensor) -> Tensor:
    """Returns the rows of a head, (classes, features), less their mean, which changes no answer."""
    return weight - weight.mean(dim=0, keepdim=True)


@torch.no_grad()
def turn_(weight: Tensor, degrees: float, generator: torch.Generator) -> None:
    """Turn the rows of a head, less their mean, by an angle in a random direction, all together and in place.

    Args:
        weight: the head's weight, (classes, features).
        degrees: angle between the weight before and after, 0 to 180.
        generator: randomness, on the CPU.
    """
    goal, drawn = centred(weight), centred(torch.randn(weight.shape, generator=generator).to(weight))
    across = drawn - (drawn * goal).sum() / goal.square().sum() * goal
    angle = math.radians(degrees)
    weight.add_((math.cos(angle) - 1) * goal + math.sin(angle) * goal.norm() / across.norm() * across)


@contextmanager
def in_own_units(model: nn.Module, head: Head, inputs: Inputs, temperature: float = 1.0) -> Iterator[None]:
    """While the block runs, the model computes the same with a head of one length, whatever the scale of its features.

    The rows of the head, less their mean, get the root mean square length `ROW`; its input is multiplied by the factor
    that the rows were divided by. If the features grow with weight and bias of the last normalisation, these get a root
    mean square of 1. At a temperature, that input and the bias are divided by it, and so are the scores.

    Args:
        model: any classifier, changed in place and back.
        head: its last linear layer.
        inputs: one batch of model inputs.
        temperature: what the scores are divided by in the block, more than 0.

    Raises:
        UnbackdoorError: the weight of the head is computed from other tensors.
    """
    check_weight_is_own(head.layer)
    with torch.no_grad():
        weight = head.layer.weight
        length = (centred(weight).square().sum(dim=1).mean().sqrt() / ROW).clamp_min(torch.finfo(weight.dtype).tiny)
        scaling = _last_normalisation(model, head, inputs)
        size = torch.cat([*scaling]).square().mean().sqrt().to(weight) if scaling else weight.new_ones(())
        weight.div_(length)
        for parameter in scaling:
            parameter.div_(size)
        biases = [] if head.layer.bias is None else [head.layer.bias]
        for parameter in biases:
            parameter.div_(temperature)
    factor = length * size / temperature
    hook = head.layer.register_forward_pre_hook(lambda _module, given: (given[0] * factor, *given[1:]))
    try:
        with removing([hook]):
            yield
    finally:
        with torch.no_grad():
            weight.mul_(length)
            for parameter in scaling:
                parameter.mul_(size)
            for parameter in biases:
                parameter.mul_(temperature)


@torch.no_grad()
def _last_normalisation(model: nn.Module, head: Head, inputs: Inputs) -> list[nn.Parameter]:
    """Returns weight and bias of the normalisation that ran last if features double with them, else nothing."""
    ran: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, _given, _output: ran.append(module))
        for module in model.modules()
        if (own := list(module.parameters(recurse=False))) and all(parameter.ndim == 1 for parameter in own)
    ]
    with evaluating(model), removing(hooks):
        logits(model, inputs)
    if not ran:
        return []
    parameters = list(ran[-1].parameters(recurse=False))
    with evaluating(model):
        before = features(model, inputs, head)
        for parameter in parameters:
            parameter.mul_(2)
        after = features(model, inputs, head)
        for parameter in parameters:
            parameter.div_(2)
    doubled = before.abs().max() > 0 and torch.allclose(
        after, 2 * before, rtol=1e-4, atol=1e-6 * float(before.abs().max())
    )
    return parameters if doubled else []
