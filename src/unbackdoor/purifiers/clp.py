"""Channel Lipschitzness-based pruning."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data import Dataset
from unbackdoor._purify import Run
from unbackdoor._units import Channels, channels, silence_
from unbackdoor._values import value


@value
class CLP:
    needs_clean: ClassVar[bool] = False
    u: Annotated[float, Field(ge=0)] = 3.0

    def __call__(self, model: nn.Module, clean: Dataset | None, run: Run) -> nn.Module:
        """Purify in place."""
        pruned = 0
        for unit in channels(model, self):
            bound = lipschitz_bounds(unit)
            dead = bound > bound.mean() + self.u * bound.std()
            silence_(unit.norm, dead)
            pruned += int(dead.sum())
        run.note(f"CLP pruned {pruned} channels.")
        return model


@torch.no_grad()
def lipschitz_bounds(unit: Channels) -> Tensor:
    weight = unit.convolution.weight.flatten(2)  # (outputs, inputs, kernel area)
    largest = torch.linalg.matrix_norm(weight.double(), ord=2)  # (outputs,)
    assert unit.norm.running_var is not None
    return largest * (unit.norm.weight / (unit.norm.running_var + unit.norm.eps).sqrt()).abs()
