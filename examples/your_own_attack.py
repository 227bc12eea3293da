"""An attack of your own in 40 lines: a frozen value with the parts of its trigger, and the function that puts it on.

    python examples/your_own_attack.py                                      # checks the contract

In a grid, with this folder on PYTHONPATH: [[attacks]] name = "your_own_attack:Stripe". On the command line:
unbackdoor attack your_own_attack:Stripe --data DATA --out DIR --thickness 2
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from unbackdoor import Dataset
from unbackdoor.testing import check_attack, value


@value
class Stripe:
    """A white stripe along the left border.

    Args:
        thickness: in pixels, at least 1.
        target: the class that the attacker wants.
        label_rule: all-to-one, all-to-all or clean-label.

    Differences from the paper: it has no paper.
    """

    thickness: Annotated[int, Field(ge=1)] = 1
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: Literal["all-to-one", "all-to-all", "clean-label"] = "all-to-one"

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """`mask`, (1, height, width): 1 where the stripe is."""
        mask = torch.zeros(1, *shape[1:])
        mask[:, :, : self.thickness] = 1
        return {"mask": mask}

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Put the stripe on (batch, channels, height, width) pixels in [0, 1]."""
        return torch.maximum(pixels, arrays["mask"])


if __name__ == "__main__":
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    check_attack(Stripe(), Dataset(items=pixels, labels=torch.arange(40) % 4), classes=4)
    print("Stripe keeps the contract.")
