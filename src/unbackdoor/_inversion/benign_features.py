"""Benign features, separated from the rest: the decoupling that BTI-DBF begins with."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Dataset
from unbackdoor._models.hooks import watching
from unbackdoor._purification.run import Run


class CleanFeatures(NamedTuple):
    """The features of the clean examples that the head sees, in units of their standard deviation.

    Args:
        scaled: the features divided by `scale`, (n, in_features).
        scale: the standard deviation of all entries.
    """

    scaled: Tensor
    scale: Tensor


def clean_features(model: nn.Module, clean: Dataset, run: Run) -> CleanFeatures:
    """Returns the features of the clean examples, in their order."""
    parts, order = [], []
    with torch.no_grad(), watching(run.head(model)) as seen:
        for batch in clean.batches(run.arithmetic.evaluation_batch):
            run.scores(model, batch.inputs)
            parts.append(seen[0].to(run.arithmetic.dtype))
            order.append(batch.rows)
    features = torch.cat(parts)[torch.cat(order).argsort()]
    scale = features.std().clamp(min=1e-12)
    return CleanFeatures(features / scale, scale)


def benign_mask(head: nn.Linear, features: CleanFeatures, labels: Tensor, run: Run, steps: int = 200) -> Tensor:
    """Learns the mask of benign features, (in_features,), in (0, 1): Adam at 0.01, batches of 128, from 0.5."""
    free = torch.zeros_like(features.scaled[0]).requires_grad_(True)
    optimizer = torch.optim.Adam([free], lr=0.01)
    for _ in range(steps):
        rows = torch.randperm(len(labels), generator=run.generator)[:128].to(labels.device)
        mask, raw = free.tanh() / 2 + 0.5, features.scaled[rows] * features.scale
        kept, left = head(mask * raw), head((1 - mask) * raw)  # (batch, classes) each
        loss = F.cross_entropy(kept, labels[rows]) - F.cross_entropy(left, labels[rows]) + 3 * mask.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return (free.tanh() / 2 + 0.5).detach()
