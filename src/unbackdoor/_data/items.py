"""The items of a data set: one protocol for every kind of them."""

from collections.abc import Hashable
from typing import Protocol, Self

import torch
from torch import Tensor

from unbackdoor._data.augmentation import Augmentation


class Items(Protocol):
    """Items of a data set: `Images`, `Texts`, or another kind with these methods; each kind has an encoder."""

    @property
    def shape(self) -> torch.Size:
        """(n, ...): the number of items, and the shape of each; (n,) if they have none."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor | slice) -> Self:
        """The items of some rows (numbers or a mask), in that order."""

    def joined(self, others: Self) -> Self:
        """These items, then the others."""

    def replaced(self, rows: Tensor, others: Self) -> Self:
        """These items, with others in some rows."""

    def identities(self) -> list[Hashable]:
        """Returns something hashable for each item, equal for equal items."""

    def on(self, device: torch.device | str) -> Self:
        """The same items with their tensors on another device."""

    def augmented(self, augment: Augmentation, generator: torch.Generator) -> Self:
        """The items as training sees them; `generator` lives on the CPU."""

    def order(self, size: int, generator: torch.Generator | None) -> Tensor:
        """The row numbers in the order in which batches of `size` take them, (n,); shuffled if a generator is given."""
