"""Prepared: pictures that already carry a trigger."""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from unbackdoor._attack import Crafting, LabelRule
from unbackdoor._data import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._values import value


@value
class Prepared:
    """Pictures that already carry a trigger, made elsewhere (SSBA, say).

    Args:
        triggered: a triggered copy of the training data, row for row (any DATA).
        target: the class that the attacker wants.
        label_rule: all-to-one, all-to-all or clean-label.

    Differences from the paper: none; there is no paper.
    """

    triggered: str
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: LabelRule = "all-to-one"

    repeatable: ClassVar[bool] = False
    test_time: ClassVar[str] = "not known: score with --triggered and test data made elsewhere"

    def arrays(self, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """None: what the trigger is made of is not known."""
        return {}

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Refused: a prepared trigger cannot be put on other images."""
        raise UnbackdoorError(
            "Prepared cannot trigger other pictures: score with --triggered and test data that carries the trigger."
        )

    def craft(self, crafting: Crafting, arrays: dict[str, Tensor]) -> Tensor:
        """The prepared pictures of the poisoned rows, uint8."""
        copies = Dataset.load(self.triggered, crafting.data.encode, augment="none")
        if copies.pixels.shape != crafting.data.pixels.shape:
            raise UnbackdoorError(
                f"Prepared.triggered must be the training data row for row, {tuple(crafting.data.pixels.shape)}, "
                f"got {tuple(copies.pixels.shape)} in {self.triggered}."
            )
        return copies.pixels[crafting.rows]
