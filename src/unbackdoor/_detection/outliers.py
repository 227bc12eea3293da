"""How abnormal the strongest shortcut is among the classes of one model."""

import math

import torch
from torch import Tensor

LEAST_CLASSES = 5  # with fewer, the spread of the others says nothing
LEAST_SPREAD = 0.1  # of strengths: sizes are not found more exactly than to a tenth


def outlier_p_values(strengths: Tensor) -> Tensor:
    """For each class, how likely a class as far above the others is among equal classes, (classes,).

    The distance is t = (x - mean) / (s sqrt(1 + 1 / (K - 1))), with mean and standard deviation s of the K - 1 others.
    For normal strengths it has Student's distribution with K - 2 degrees of freedom; the probability is multiplied by
    K, as the largest is picked by looking. Fewer than 5 classes give 1 for all.

    >>> outlier_p_values(torch.tensor([0.0, 1.0, -1.0, 0.5, -0.5, 0.0, 9.0])).argmin()
    tensor(6)
    """
    count = len(strengths)
    if count < LEAST_CLASSES:
        return torch.ones(count)
    from scipy.stats import t as student

    values = strengths.double().cpu()
    others = values.expand(count, count)[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)
    spread = others.std(dim=1).clamp(min=LEAST_SPREAD)
    distances = (values - others.mean(dim=1)) / (spread * math.sqrt(1 + 1 / (count - 1)))
    return torch.from_numpy(count * student.sf(distances.numpy(), count - 2)).clamp(max=1)
