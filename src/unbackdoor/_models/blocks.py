"""The blocks of a network of any architecture, found by running it, and one vector of each for an input."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from unbackdoor._data.texts import Tokens
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import Inputs, logits
from unbackdoor._models.stage_ends import output_shapes, replacing, watching_output

AnswerToken = Literal["first", "last", "all"]

_LISTS = (nn.ModuleList, nn.Sequential)


def blocks(model: nn.Module, inputs: Inputs, head: str, owner: str) -> list[str]:
    """Returns the names of the blocks of a network, in running order.

    Blocks are the outermost members of a ModuleList or Sequential that are not lists themselves: those of a transformer
    or of a residual network, or the single layers of a plain one. A network without such lists has its layers as
    blocks. The head is none.

    Args:
        model: any classifier.
        inputs: a batch.
        head: name of the last linear layer.
        owner: name of the class that asks, for the message.

    Raises:
        UnbackdoorError: there is no layer before the head.
    """
    images = isinstance(inputs, Tensor)
    names = [
        name
        for name, shape in output_shapes(model, inputs).items()
        if name != head and (len(shape) in (2, 3) or (images and len(shape) == 4))
    ]
    listed = [
        name
        for name in names
        if isinstance(model.get_submodule(name.rpartition(".")[0]), _LISTS)
        and not isinstance(model.get_submodule(name), _LISTS)
    ]
    outer = [name for name in listed if not any(name.startswith(f"{other}.") for other in listed)]
    leaves = [name for name in names if not any(True for _ in model.get_submodule(name).children())]
    if not (outer or leaves):
        raise UnbackdoorError(f"{owner} needs a layer before the head; {type(model).__name__} has none. Try strip.")
    return outer or leaves


def channels_first(features: Tensor, inputs: Inputs) -> bool:
    """Whether features are maps with the channels before the positions: their sides are those of a smaller image."""
    if not isinstance(inputs, Tensor) or features.ndim != 4:
        return False
    (height, width), (rows, columns) = inputs.shape[2:], features.shape[2:]
    return rows * width == columns * height


def by_position(features: Tensor, inputs: Inputs) -> Tensor:
    """Returns the features of a layer as (batch, positions, width), whatever their shape."""
    if features.ndim == 2:
        return features[:, None]
    if features.ndim == 4:
        return (features.flatten(2).transpose(1, 2)) if channels_first(features, inputs) else features.flatten(1, 2)
    return features


def kept_positions(features: Tensor, inputs: Inputs) -> Tensor:
    """Which of the positions are not padding, (batch, positions), bool."""
    if isinstance(inputs, Tokens) and features.shape[:2] == inputs.shape:
        return inputs["attention_mask"].bool()
    return torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)


def answer_token(model: nn.Module, inputs: Inputs, block: str) -> AnswerToken:
    """Finds the tokens that a classifier answers from: those of its last block through which a gradient flows.

    Args:
        model: in eval mode.
        inputs: a batch.
        block: name of the last block.

    Returns:
        The first or the last token that is not padding, or all of them; `all` for feature maps.
    """
    layer = model.get_submodule(block)
    with watching_output(layer) as seen, torch.no_grad():
        logits(model, inputs)
    if seen[0].ndim != 3:
        return "all"
    tokens = seen[0].detach().requires_grad_()
    with replacing(layer, tokens), torch.enable_grad():
        scores = logits(model, inputs)[:, 0]
        (gradient,) = torch.autograd.grad(scores.sum(), tokens, allow_unused=True)
    if gradient is None:
        return "all"
    read, kept = gradient.abs().amax(dim=2) > 0, kept_positions(tokens, inputs)
    places: list[AnswerToken] = ["first", "last"]
    return next((place for place in places if torch.equal(read, _one(kept, place))), "all")


def _one(kept: Tensor, place: AnswerToken) -> Tensor:
    """The first or the last of the kept positions, (batch, positions), bool."""
    order = kept.long().cumsum(dim=1)
    return kept & (order == (1 if place == "first" else order[:, -1:]))


def vectors(features: Tensor, inputs: Inputs, place: AnswerToken) -> Tensor:
    """Returns a vector for each input, (batch, width): of the token that the model answers from, or their mean."""
    tokens = by_position(features, inputs)
    kept = kept_positions(tokens, inputs)
    chosen = (kept if place == "all" else _one(kept, place))[..., None]
    return (tokens * chosen).sum(dim=1) / chosen.sum(dim=1).clamp(min=1)


@contextmanager
def watching_blocks(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """The features of each block in the latest forward pass, by its name, as the only entry of a list."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(watching_output(model.get_submodule(name))) for name in names}
