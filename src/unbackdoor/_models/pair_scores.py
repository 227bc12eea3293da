"""The scores of a model of images and texts for a batch of pairs: how well each caption fits each image."""

from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._data.pair_encoder import PairTokens
from unbackdoor._data.texts import Tokens
from unbackdoor._errors import UnbackdoorError


def pair_scores(model: nn.Module, inputs: PairTokens) -> Tensor:
    """Returns the scaled cosine of each image and each caption of a batch, (images, captions).

    A caption that several images have is read once, so that in train mode its copies share what dropout draws.

    Raises:
        UnbackdoorError: the model does not return such scores as `logits_per_image`.
    """
    captions, copies = distinct(inputs.captions)
    output: Any = model(pixel_values=inputs.pixels, **captions)
    scores = getattr(output, "logits_per_image", None)
    if not isinstance(scores, Tensor) or scores.shape != (len(inputs.pixels), len(captions)):
        raise UnbackdoorError(
            f"{type(model).__name__} must return logits_per_image of shape (images, captions), as CLIPModel of "
            "transformers does. Take such a model, or data for a classifier."
        )
    return scores[:, copies]


def distinct(captions: Tokens) -> tuple[Tokens, Tensor]:
    """Returns the tokens of the captions without repetitions, and the place of each caption among them, (batch,)."""
    whole = torch.cat([captions[name] for name in sorted(captions)], dim=1)
    unique, copies = torch.unique(whole, dim=0, return_inverse=True)
    first = torch.empty(len(unique), dtype=torch.int64, device=copies.device)
    first[copies.flip(0)] = torch.arange(len(copies), device=copies.device).flip(0)
    return Tokens({name: tensor[first] for name, tensor in captions.items()}), copies
