"""The last layer of each stage of a network of any architecture, found by running it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import Inputs, evaluating, logits
from unbackdoor._models.hooks import removing
from unbackdoor._models.linear_heads import LinearHead


@torch.no_grad()
def output_shapes(model: nn.Module, inputs: Inputs) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the features of all layers that have a row for each input, in the order of their ends."""
    shapes: dict[str, tuple[int, ...]] = {}

    def keep(name: str, output: Any) -> None:
        features = features_of(output)
        if features is not None and len(features) == len(inputs):
            shapes.pop(name, None)
            shapes[name] = tuple(features.shape)

    hooks = [
        module.register_forward_hook(lambda _module, _args, output, name=name: keep(name, output))
        for name, module in model.named_modules()
        if name and not isinstance(module, LinearHead)  # the linear layer in it is the head
    ]
    with removing(hooks), evaluating(model):
        logits(model, inputs)
    return shapes


@torch.no_grad()
def stage_ends(model: nn.Module, inputs: Inputs, owner: str) -> list[str]:
    """Returns the names of at most three layers that end a stage of a network.

    In transformers these are the blocks at a third, at two thirds and at the end; blocks are the outermost members of a
    ModuleList or Sequential that return one vector for each token. In other networks they are the last feature maps of
    the last three resolutions with more than one position.

    Args:
        model: any classifier.
        inputs: a batch.
        owner: value whose class is named in the message.

    Raises:
        UnbackdoorError: no layer has more than one position.
    """
    shapes = output_shapes(model, inputs)
    listed = [
        name
        for name, shape in shapes.items()
        if len(shape) == 3
        and shape[1] > 1
        and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList | nn.Sequential)
    ]
    blocks = [name for name in listed if not any(name.startswith(f"{other}.") for other in listed)]
    if blocks:
        count = min(3, len(blocks))
        return [blocks[len(blocks) * part // count - 1] for part in range(1, count + 1)]
    last: dict[tuple[int, ...], str] = {}
    for name, shape in shapes.items() if isinstance(inputs, Tensor) else ():
        # If the last dimension of a layer's output is the channels, its shape is not that of a smaller image.
        if len(shape) == 4 and shape[2] * shape[3] > 1 and shape[2] * inputs.shape[3] == shape[3] * inputs.shape[2]:
            last.pop(shape[2:], None)
            last[shape[2:]] = name
    if not last:
        raise UnbackdoorError(
            f"{owner} needs feature maps of convolutions, or transformer blocks; {type(model).__name__} has none. "
            "Try fst."
        )
    return list(last.values())[-3:]


def features_of(output: Any) -> Tensor | None:
    """Returns the features in the output of a layer; None if there are none."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


@contextmanager
def watching_output(layer: nn.Module) -> Iterator[list[Tensor]]:
    """The features in the output of a layer in the latest forward pass, as the only entry of a list."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _arguments: Any, output: Any) -> None:
        features = features_of(output)
        seen[:] = [] if features is None else [features]

    with removing([layer.register_forward_hook(keep)]):
        yield seen


@contextmanager
def changing(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the features in the output of a layer while the block runs."""

    def swap(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        parts = (change(output[0]), *output[1:])
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)  # a named tuple, or not

    with removing([layer.register_forward_hook(swap)]):
        yield


def replacing(layer: nn.Module, features: Tensor) -> AbstractContextManager[None]:
    """Put features in place of those in the output of a layer while the block runs; a gradient flows into them."""
    return changing(layer, lambda _before: features)
