"""The common part of all searches for a trigger: a frozen model, and batches drawn pass after pass."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._models.calling import evaluating
from unbackdoor._purification.run import Run


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Set eval mode and no gradients for weights while the block runs: only the trigger is searched."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with evaluating(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def training_batches(data: Dataset, size: int, steps: int, run: Run) -> Iterator[Batch]:
    """Yields `steps` shuffled batches, pass after pass; they count as examples seen."""
    left = steps
    while left > 0:
        for batch in data.batches(size, generator=run.generator):
            run.examples_seen += len(batch.labels)
            yield batch
            left -= 1
            if left == 0:
                return
