"""A purifier of your own in 40 lines: a frozen value that can be called. You inherit and register nothing.

    python examples/your_own_method.py                                      # checks the contract

In a grid, with this folder on PYTHONPATH: [[methods]] name = "your_own_method:Shrinking". On the command line:
unbackdoor purify your_own_method:Shrinking MODEL --clean DATA --out DIR --factor 0.8
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from unbackdoor import Dataset, Run
from unbackdoor.testing import check_method, value


@value
class Shrinking:
    """Make all weight matrices a little smaller, then tune.

    Args:
        factor: multiplies the weights; more than 0 and at most 1.
        epochs: passes over the clean examples, at least 1.

    Differences from the paper: it has no paper.
    """

    factor: Annotated[float, Field(gt=0, le=1)] = 0.9
    epochs: Annotated[int, Field(ge=1)] = 5

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place: the model is this method's own copy."""
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.mul_(self.factor)
        run.tune(model, clean, epochs=self.epochs)
        return model


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
    pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    check_method(Shrinking(), model, Dataset(items=pixels, labels=(pixels[:, 0, 0, 0] > 127).long()))
    print("Shrinking keeps the contract.")
