"""Pruning in stages, for as long as clean accuracy allows; several purifiers do it."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unbackdoor._data.dataset import Dataset
from unbackdoor._purification.run import Run


@torch.no_grad()
def as_far_as_accurate_(
    parameters: Sequence[Tensor], stages: Iterable[Callable[[], None]], accurate: Callable[[], bool]
) -> int:
    """Prune in stages, from mild to severe, up to the last one after which the model is still accurate.

    Args:
        parameters: all parameters that a stage may change.
        stages: functions that each change some of them in place.
        accurate: called after each stage; whether the model is still accurate.

    Returns:
        how many stages were kept.
    """
    kept = 0
    for stage in stages:
        before = [parameter.clone() for parameter in parameters]
        stage()
        if not accurate():
            for parameter, earlier in zip(parameters, before, strict=True):
                parameter.copy_(earlier)
            break
        kept += 1
    return kept


def still_accurate(model: nn.Module, held: Dataset, run: Run, tolerance: float) -> Callable[[], bool]:
    """Returns a check whether quality on held-out examples has fallen by no more than a tolerance since this call.

    Args:
        model: the model that is pruned.
        held: examples.
        run: provides task and arithmetic.
        tolerance: a share of the examples; of a language model, nats per answer token.
    """
    floor = run.quality(model, held) - tolerance
    return lambda: run.quality(model, held) >= floor


@torch.no_grad()
def silence_(norm: _BatchNorm, dead: Tensor, *, bias: bool = True) -> None:
    """Silence channels of a BatchNorm in place: their weight becomes zero, and with `bias` their bias as well.

    Args:
        norm: a layer that has a weight.
        dead: the channels to silence, (channels,), bool.
        bias: also zero the bias; otherwise a channel becomes constant.
    """
    norm.weight[dead] = 0
    if bias:
        norm.bias[dead] = 0
