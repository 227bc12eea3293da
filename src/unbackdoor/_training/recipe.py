"""The optimizer, learning rate and batch size that a method uses if it leaves them open, by the kind of data."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple


class Recipe(NamedTuple):
    """How networks of a modality are tuned if a method leaves learning rate and batch size open.

    Args:
        optimizer: SGD with momentum 0.9, no weight decay, cosine per epoch, for images; AdamW with its usual decay of
            0.01, linear to 0 per step, for texts, conversations and pairs of image and caption.
        learning_rate: learning rate at the start.
        batch_size: examples per step.
    """

    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    batch_size: int


RECIPES: Mapping[str, Recipe] = {
    "images": Recipe("sgd", 0.01, 128),
    "text": Recipe("adamw", 5e-5, 16),
    "conversations": Recipe("adamw", 5e-5, 8),
    "image-text": Recipe("adamw", 1e-5, 64),  # of CleanCLIP
}

STEPS: Mapping[str, int] = {"images": 20}
"""Steps that a pass should have, where examples are few: in the setting of FST's paper, 2,500 images, it has 20.
Kinds of data that are not here have small batches in any case."""

Defaults = Mapping[str, Mapping[str, Any]]
"""A method's values by modality for the fields that are None unless the user sets them. See `Run.setting`."""
