"""Training a model by matrices of low rank next to its layers."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.adapters import carries_adapter
from unbackdoor._purification.run import Run
from unbackdoor._training.lora import adapted, merged


@contextmanager
def low_rank(model: nn.Module, run: Run, method: object, *, rank: int, alpha: int | None = None) -> Iterator[None]:
    """While the block runs, only matrices of low rank are trained, which are then added to the layers of the model.

    An adapter has such matrices of its own; then these are trained, and it stays an adapter.

    Args:
        model: a model of transformers or an adapter on one, changed in place.
        run: provides the seed.
        method: named in the message.
        rank: rank of the matrices.
        alpha: numerator of their scale; by default twice the rank.

    Raises:
        UnbackdoorError: peft is not installed, or the model is not one of transformers.
    """
    if carries_adapter(model):
        yield
        return
    if not hasattr(model, "can_generate"):
        raise UnbackdoorError(
            f"{type(method).__name__} needs a model of transformers, got {type(model).__name__}. Try fine-tuning."
        )
    wrapped = adapted(model, rank=rank, seed=run.seed, alpha=alpha)
    yield
    merged(wrapped)
