"""Running statistics that are those of the last batch, or still those of before a training, made those of its data."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from unbackdoor._data.dataset import Dataset
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.calling import logits
from unbackdoor._models.hooks import without_dropout

USUAL_MOMENTUM = 0.1  # torch's own
LARGEST_MOMENTUM = 0.5  # MobileNet v1 and v2 of transformers have 0.9997 and 0.997
OLD = 0.05  # share of the statistics of before a training that may be left


@torch.no_grad()
def settle_(
    model: nn.Module, data: Dataset, batch_size: int, generator: torch.Generator, work: Arithmetic, steps: int
) -> None:
    """Give BatchNorm layers of an unusual momentum the mean statistics of batches that make one pass over the data.

    In torch a momentum near 1 means that the running statistics are those of the last batch, which may be of few
    examples, and eval mode depends on them. Models with such layers come from frameworks where the same number means
    the opposite. With one far below the usual 0.1 (0.01 in MobileNet v3, say), or with none, which means the average
    over all batches there ever were, the statistics hardly follow the weights in a short training: they would be those
    of the model as it was before. Layers in eval mode, and all layers of a usual momentum, stay as they are.

    Args:
        model: a model in train mode.
        data: the examples it was trained on.
        batch_size: examples per batch.
        generator: of the order of the examples, on the CPU.
        work: device, precision, layout.
        steps: batches that it was trained on.
    """
    unusual = [
        (module, module.momentum)
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.training and _unsettled(module, steps)
    ]
    if not unusual:
        return
    try:
        with without_dropout(model):
            for number, batch in enumerate(data.batches(batch_size, generator=generator), 1):
                if number > 1 and len(batch.labels) < batch_size:
                    break
                for module, _ in unusual:
                    module.momentum = 1 / number
                with work.autocast():
                    logits(model, work.lay(batch.inputs))
    finally:
        for module, momentum in unusual:
            module.momentum = momentum


def _unsettled(layer: _BatchNorm, steps: int) -> bool:
    """Whether the momentum of a layer leaves too little or too much of its statistics of before the last steps."""
    if layer.momentum is not None:
        momentum = layer.momentum
        slow = 0 < momentum < USUAL_MOMENTUM and (1 - momentum) ** steps > OLD
        return momentum > LARGEST_MOMENTUM or slow
    count = 0 if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
    return count - steps > OLD * count
