"""The contrastive loss of models of images and texts, and training with a text tower that stays as it is."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.image_text import image_features
from unbackdoor._models.pair_scores import distinct
from unbackdoor._training.descent import Gradients, Loss


def contrastive(scores: Tensor) -> Tensor:
    """Returns the mean of two cross-entropies: of each image over all captions, and of each caption over all images.

    The loss of CLIP: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML
    2021, https://arxiv.org/abs/2103.00020

    Args:
        scores: scaled cosines, (batch, batch); pairs that belong together are on the diagonal.
    """
    return (matching(scores) + matching(scores.T)) / 2


def matching(scores: Tensor, reduction: str = "mean") -> Tensor:
    """Returns the cross-entropy of each row with its own column as the answer; see `contrastive`."""
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device), reduction=reduction)


def frozen_text_tower(model: Any, data: Dataset, arithmetic: Arithmetic, loss: Loss | None = None) -> Gradients:
    """Freeze the text tower but for its projection, and return a step that takes its answers from a table.

    Each distinct caption of the data is read once, in eval mode, so that a step costs the image tower alone (Zhai et
    al., "LiT: Zero-Shot Transfer with Locked-image text Tuning", CVPR 2022, which locks the other tower).

    Args:
        model: a model of images and texts, on the device; its text tower gets no gradients any more.
        data: all pairs that will be trained on.
        arithmetic: device, precision, layout.
        loss: of the scaled cosines, (batch, batch); None for the contrastive one.
    """
    tower: nn.Module = model.text_model
    tower.requires_grad_(False).eval()
    whole = data.pair_encoder.texts(data.pairs.captions)
    captions, copies = distinct(whole)
    size, rows = arithmetic.evaluation_batch, []
    with torch.no_grad(), arithmetic.autocast():
        for start in range(0, len(captions), size):
            part = {name: tensor[start : start + size].to(arithmetic.device) for name, tensor in captions.items()}
            rows.append(tower(**part).pooler_output.float())
    table, copies = torch.cat(rows), copies.to(arithmetic.device)

    def fill(batch: Batch) -> None:
        pixels = arithmetic.lay(batch.inputs.pixels)  # type: ignore[union-attr]
        with arithmetic.autocast():
            images = image_features(model, pixels)  # type: ignore[arg-type]
            texts = model.text_projection(table[copies[batch.rows]])
        texts = texts / texts.norm(dim=1, keepdim=True)
        scores = model.logit_scale.exp() * images @ texts.T
        scores = scores if scores.dtype == torch.float64 else scores.float()
        (contrastive(scores) if loss is None else loss(scores, batch)).backward()

    return fill
