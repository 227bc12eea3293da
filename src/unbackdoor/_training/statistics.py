"""Running statistics that are those of the last batch, made those of all examples."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from unbackdoor._data.dataset import Dataset
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.calling import logits
from unbackdoor._models.hooks import without_dropout

LARGEST_MOMENTUM = 0.5  # torch's own is 0.1; MobileNet v1 and v2 of transformers have 0.9997 and 0.997


@torch.no_grad()
def settle_(model: nn.Module, data: Dataset, batch_size: int, generator: torch.Generator, work: Arithmetic) -> None:
    """Give BatchNorm layers of a large momentum the mean statistics of batches that make one pass over the data.

    In torch a momentum near 1 means that the running statistics are those of the last batch, which may be of few
    examples, and eval mode depends on them. Models with such layers come from frameworks where the same number means
    the opposite. Layers in eval mode, and all layers of a usual momentum, stay as they are.

    Args:
        model: a model in train mode.
        data: the examples it was trained on.
        batch_size: examples per batch.
        generator: of the order of the examples, on the CPU.
        work: device, precision, layout.
    """
    forgetful = [
        (module, module.momentum)
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.training and (module.momentum or 0.0) > LARGEST_MOMENTUM
    ]
    if not forgetful:
        return
    try:
        with without_dropout(model):
            for number, batch in enumerate(data.batches(batch_size, generator=generator), 1):
                if number > 1 and len(batch.labels) < batch_size:
                    break
                for module, _ in forgetful:
                    module.momentum = 1 / number
                with work.autocast():
                    logits(model, work.lay(batch.inputs))
    finally:
        for module, momentum in forgetful:
            module.momentum = momentum
