"""Perturbations of a model's inputs: of pixels, or of the word embeddings of a text."""

from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.texts import Tokens
from unbackdoor._models.calling import Inputs, embeddings, like_inputs, logits
from unbackdoor._models.hooks import removing


def perturbed_logits(model: nn.Module, inputs: Inputs, perturbation: Tensor) -> Tensor:
    """Returns class scores under a perturbation; a gradient flows through it.

    Args:
        model: any classifier; a text model must be one of transformers.
        inputs: a batch.
        perturbation: change that is added to the model's pixels, (batch, channels, height, width), or to the output of
            its embedding layer, (batch, length, width). A batch of 1 perturbs all examples alike.

    Raises:
        UnbackdoorError: a text model that does not give its embedding layer.
    """
    if not isinstance(inputs, Tokens):
        return logits(model, inputs + perturbation)

    def perturbed(_layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        # XLNet has the tokens of a text along the first dimension, and the texts of a batch along the second.
        turned = bool(arguments) and not torch.equal(arguments[0], inputs["input_ids"])
        turned = turned and torch.equal(arguments[0], inputs["input_ids"].t())
        return output + (perturbation.transpose(0, 1) if turned else perturbation)

    # An encoder and its decoder may each have an embedding layer, with one shared weight.
    weight = embeddings(model).weight
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Embedding) and layer.weight is weight]
    with removing([layer.register_forward_hook(perturbed) for layer in layers]):
        return logits(model, inputs)


def perturbation_shape(model: nn.Module, inputs: Inputs) -> tuple[int, ...]:
    """Returns the shape of one perturbation per example: that of pixels, or (batch, length, width) of embeddings.

    Raises:
        UnbackdoorError: a text model that does not give its embedding layer.
    """
    return (*inputs.shape, embeddings(model).embedding_dim) if isinstance(inputs, Tokens) else tuple(inputs.shape)


def perturbation_unit(model: nn.Module, data: Dataset) -> Tensor:
    """Returns the factor between a perturbation in units of 1 and the numbers that the model gets.

    For images, the whole range of a pixel from black to white, (1 or channels, 1, 1). For texts, the root mean square
    of all entries of the word embeddings, (): the embedding of a word is about as long as a perturbation with 1 in each
    entry.

    Raises:
        UnbackdoorError: a text model that does not give its embedding layer.
    """
    if data.modality == "text":
        return embeddings(model).weight.detach().square().mean().sqrt()
    like = like_inputs(model)
    std = torch.tensor(data.image_encoder.std, device=like.device, dtype=like.dtype)
    return (255 * data.image_encoder.scale / std).view(-1, 1, 1)
