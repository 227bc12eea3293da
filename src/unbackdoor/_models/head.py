"""The head of a classifier, the last linear layer, found by running it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor._errors import NoHeadError, UnbackdoorError
from unbackdoor._models.calling import Inputs, check_repeatable, checked_logits, logits
from unbackdoor._models.hooks import removing, watching


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
    outputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _module, _args, output, key=key: outputs.__setitem__(key, output))
        for key, layer in layers.items()
    ]
    with removing(hooks):
        scores = checked_logits(model, inputs)
    check_repeatable(model, inputs, scores)
    owner = type(model).__name__
    if name is not None:
        if name not in layers:
            last = ", ".join(list(layers)[-5:]) or "none"
            raise UnbackdoorError(f"`head` must name a linear layer of {owner}, got {name}; its last ones are {last}.")
        if layers[name].out_features != scores.shape[1]:
            raise UnbackdoorError(
                f"`head` {name} has {layers[name].out_features} outputs, but {owner} answers with {scores.shape[1]} "
                "classes. Name the layer that makes the logits."
            )
        return Head(name, layers[name])
    # A router gives a tuple; and a module may cast its answer.
    tensors = {key: output.to(scores.dtype) for key, output in outputs.items() if isinstance(output, Tensor)}
    candidates = {key: _at_answer(output, scores) for key, output in tensors.items()}
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
def features(model: nn.Module, inputs: Inputs, head: Head) -> Tensor:
    """Returns the inputs of the head, (batch, in_features); of a decoder (batch, length, in_features)."""
    with watching(head.layer) as seen:
        logits(model, inputs)
    return seen[0]


def reinitialise_(layer: nn.Linear, generator: torch.Generator) -> None:
    """Draw new values of weight and bias from U(-s, s), s = 1 / sqrt(in_features), in place."""
    bound = 1 / math.sqrt(layer.in_features)
    with torch.no_grad():
        for parameter in layer.parameters():
            drawn = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_((2 * drawn - 1) * bound)
