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
    _warn_of_experts(model, run, method)
    wrapped = adapted(model, rank=rank, seed=run.seed, alpha=alpha)
    yield
    merged(wrapped)


def _warn_of_experts(model: nn.Module, run: Run, method: object) -> None:
    """Warn if most weights are in tensors of three dimensions, next to which no matrices can be put."""
    weights = {name: weight for name, weight in model.named_parameters() if "embed" not in name}
    stacked = {name: weight for name, weight in weights.items() if weight.ndim == 3}
    share = sum(each.numel() for each in stacked.values()) / max(1, sum(each.numel() for each in weights.values()))
    if share > 0.5:
        experts = any("expert" in name for name in stacked)
        what = "stacked experts" if experts else "not in linear layers (attention in three dimensions, as of XLNet)"
        run.warn(
            f"{type(method).__name__} trains matrices next to linear layers, but {share:.0%} of the weights of "
            f"{type(model).__name__} are {what}, which this tuning leaves as they are. fine-tuning and fine-mixing "
            "change them."
        )
