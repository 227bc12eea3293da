"""The head of a classifier, the last linear layer, found by running it."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor._errors import NoHeadError, UnbackdoorError
from unbackdoor._models.calling import Inputs, check_repeatable, checked_logits, evaluating, logits
from unbackdoor._models.hooks import removing, watching
from unbackdoor._models.weight_norms import check_weight_is_own


class Head(NamedTuple):
    """The last linear layer of a classifier.

    Args:
        name: name of the layer in the model.
        layer: the layer.
    """

    name: str
    layer: nn.Linear


@torch.no_grad()
def head_of(model: nn.Module, inputs: Inputs, name: str | None = None) -> Head:
    """Finds the linear layer that makes the logits, by running a batch and comparing each layer's output with them.

    Args:
        model: any classifier.
        inputs: a batch of model inputs.
        name: name of a layer to take instead.

    Raises:
        NoHeadError: no linear layer makes the logits.
        UnbackdoorError: the model answers with probabilities, at random or with one output, or the inputs do not fit
            it.
    """
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    outputs: dict[str, Tensor | None] = {}  # None if a layer does not compute what a linear one does

    def keep(key: str, layer: nn.Linear, given: tuple[Any, ...], output: Any) -> None:
        linear = isinstance(output, Tensor) and _is_linear(layer, given, output)  # a router gives a tuple
        outputs[key] = output if linear else None

    hooks = [
        layer.register_forward_hook(lambda module, given, output, key=key: keep(key, module, given, output))
        for key, layer in layers.items()
    ]
    with removing(hooks):
        scores = checked_logits(model, inputs)
    check_repeatable(model, inputs, scores)
    owner = type(model).__name__
    if name is not None:
        _check_named(name, layers, outputs, scores.shape[1], owner)
        return Head(name, layers[name])
    # A module may cast its answer.
    candidates = {
        key: _at_answer(output.to(scores.dtype), scores) for key, output in outputs.items() if output is not None
    }
    last_first = [(key, candidate) for key, candidate in reversed(candidates.items()) if candidate is not None]
    for key, candidate in last_first:
        if torch.allclose(candidate, scores, rtol=1e-4, atol=1e-6):
            return Head(key, layers[key])
    for key, candidate in last_first:
        if torch.allclose(candidate.log_softmax(1), scores, rtol=1e-4, atol=1e-5):
            return Head(key, layers[key])
        for probabilities in (candidate.softmax(1), candidate.sigmoid()):
            if torch.allclose(probabilities, scores, rtol=1e-4, atol=1e-5):
                raise UnbackdoorError(
                    f"{owner} answers with probabilities; class scores (logits) are expected. Wrap it without its last "
                    "activation."
                )
    raise NoHeadError(
        f"{owner} has no final linear layer that makes its {scores.shape[1]} logits. Name one with `head`, "
        "or end the model in an nn.Linear."
    )


def _check_named(
    name: str, layers: dict[str, nn.Linear], outputs: dict[str, Tensor | None], classes: int, owner: str
) -> None:
    """Refuse a name of a layer that cannot be the head.

    Args:
        name: as it was given.
        layers: the linear layers of a model.
        outputs: of those that ran; None for one that does not compute what a linear layer does.
        classes: the number of scores.
        owner: the class of the model.
    """
    if name not in layers:
        last = ", ".join(list(layers)[-5:]) or "none"
        raise UnbackdoorError(f"`head` must name a linear layer of {owner}, got {name}; its last ones are {last}.")
    if layers[name].out_features != classes:
        raise UnbackdoorError(
            f"`head` {name} has {layers[name].out_features} outputs, but {owner} answers with {classes} "
            "classes. Name the layer that makes the logits."
        )
    if name not in outputs:
        raise UnbackdoorError(
            f"`head` {name} is a layer that {owner} does not call, so that its outputs are not seen. Call the layer in "
            "its forward, or take fine-tuning, which needs no head."
        )
    if outputs[name] is None:
        raise UnbackdoorError(
            f"`head` {name} is a {type(layers[name]).__name__}, which does not compute what a linear layer does. Take "
            "fine-tuning, which needs no head."
        )


def _is_linear(layer: nn.Linear, given: tuple[Any, ...], output: Tensor) -> bool:
    """Whether a layer answers as a linear one; a class made from it may compare directions, say (a cosine head)."""
    if type(layer) is nn.Linear or not given or not isinstance(given[0], Tensor):
        return True
    plain = nn.functional.linear(given[0], layer.weight, layer.bias)
    near = max(1e-3, 4 * torch.finfo(plain.dtype).eps)
    return plain.shape == output.shape and torch.allclose(
        plain, output.to(plain), rtol=near, atol=near * float(plain.abs().max())
    )


def _at_answer(output: Tensor, scores: Tensor) -> Tensor | None:
    """Returns a layer's output in the shape of the logits; None if its shape does not allow it.

    If there is an output for each token, (batch, length, classes), takes the row nearest to the scores.
    """
    if output.shape == scores.shape:
        return output
    if output.ndim != 3 or output.shape[0] != len(scores) or output.shape[2] != scores.shape[1]:
        return None
    nearest = (output - scores[:, None]).abs().amax(dim=2).argmin(dim=1)  # decoders answer at their last token
    return output[torch.arange(len(scores)), nearest]


@torch.no_grad()
def passed_by(model: nn.Module, inputs: Inputs, head: Head) -> bool:
    """Whether something reaches the class scores without going through the head, such as another head next to it."""
    hook = head.layer.register_forward_hook(lambda _module, _given, output: output[:1].expand_as(output))
    with removing([hook]), evaluating(model):
        scores = logits(model, inputs)
    return not torch.allclose(scores, scores[:1], rtol=1e-3, atol=1e-3 * float(scores.abs().max()))


@torch.no_grad()
def features(model: nn.Module, inputs: Inputs, head: Head) -> Tensor:
    """Returns the inputs of the head, (batch, in_features); of a decoder (batch, length, in_features)."""
    with watching(head.layer) as seen:
        logits(model, inputs)
    return seen[0]


def reinitialise_(layer: nn.Linear, generator: torch.Generator) -> None:
    """Draw new values of weight and bias from U(-s, s), s = 1 / sqrt(in_features), in place.

    Raises:
        UnbackdoorError: the weight is computed from other tensors.
    """
    check_weight_is_own(layer)
    bound = 1 / math.sqrt(layer.in_features)
    with torch.no_grad():
        for parameter in layer.parameters():
            drawn = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_((2 * drawn - 1) * bound)
