"""Prepared: examples that already carry a trigger."""

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from unbackdoor._data.dataset import Dataset, ItemsLike
from unbackdoor._errors import UnbackdoorError
from unbackdoor._poisoning.attack import Crafting, LabelRule
from unbackdoor._value import value


@value
class Prepared:
    """Images or texts that already carry a trigger, made elsewhere (SSBA, syntactic or style paraphrases).

    Args:
        triggered: a triggered copy of the training data, row for row (any DATA), with the same column names.
        target: the class that the attacker wants.
        label_rule: all-to-one, all-to-all or clean-label.

    Differences from the paper: none; there is no paper.
    """

    triggered: str
    target: Annotated[int, Field(ge=0)] = 0
    label_rule: LabelRule = "all-to-one"

    modality: ClassVar[tuple[str, ...]] = ("images", "text")
    repeatable: ClassVar[bool] = False
    test_time: ClassVar[str] = "not known: score with triggered test data that was made elsewhere"

    def arrays(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Returns nothing: the parts of the trigger are not known."""
        return {}

    def apply(self, pixels: Any, arrays: dict[str, Tensor]) -> Any:
        """Refuse: a prepared trigger cannot be put on other examples."""
        raise UnbackdoorError(
            "Prepared cannot put its trigger on other examples. Score with test data that has it, as evaluate does."
        )

    def craft(self, crafting: Crafting, arrays: dict[str, Tensor]) -> ItemsLike:
        """Returns the prepared examples of the poisoned rows."""
        columns = crafting.data.columns
        copies = Dataset.load(self.triggered, crafting.data.encode, columns=columns, augment="none")
        expected, actual = ((len(data), *data.shape) for data in (crafting.data, copies))
        if expected != actual:
            raise UnbackdoorError(
                f"Prepared.triggered must be the training data row for row, {expected}, got {actual} in "
                f"{self.triggered}."
            )
        return copies.items[crafting.rows]
