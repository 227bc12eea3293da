"""The common part of attacks that use a clean model to make one trigger for all images."""

import torch
from torch import Tensor
from torch.nn import functional as F

from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import device_of, evaluating, logits
from unbackdoor._poisoning.attack import Attack, Crafting, wanted_labels


def misfit(crafting: Crafting, attack: Attack, pattern: Tensor, size: int = 128) -> Tensor:
    """Returns the surrogate's loss towards the attacker's classes on a random batch with a pattern added, a scalar.

    It is the mean over the batch of min(CE(f(x + pattern), wanted), 10), so that no image counts too much.

    Args:
        crafting: the data and the surrogate.
        attack: its target and label rule give the wanted classes.
        pattern: change that is added to pixels in [0, 1], (channels, height, width); a gradient flows through it.
        size: number of images in the batch, drawn from those that the attack is meant to move.

    Raises:
        UnbackdoorError: no surrogate was given.
    """
    data, surrogate = crafting.data, crafting.surrogate
    if surrogate is None:
        raise UnbackdoorError(
            f"{type(attack).__name__} needs a clean model to make its trigger against: pass surrogate=."
        )
    pool = torch.arange(len(data))
    if attack.label_rule != "all-to-all":
        pool = torch.nonzero(data.labels != attack.target).flatten()
    rows = pool[torch.randint(len(pool), (size,), generator=crafting.generator)]
    pixels = (data.pixels[rows].float() / 255 + pattern).clamp(0, 1)
    with evaluating(surrogate):
        inputs = data.image_encoder(pixels * 255).to(device_of(surrogate))
        scores = logits(surrogate, inputs).float()
    wanted = wanted_labels(attack.label_rule, attack.target, data.labels[rows], scores.shape[1])
    return F.cross_entropy(scores, wanted.to(scores.device), reduction="none").clamp(max=10).mean()
