"""The order and the sizes of batches whose items have lengths: similar ones next to each other, to save padding."""

import torch
from torch import Tensor


def ordered_by_length(lengths: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """Returns row numbers, (n,), with items of similar length next to each other; see `Items.order`.

    Without a generator, all are sorted by length. With one, 20 batches at a time are sorted, and the batches then
    come in random order.

    Args:
        lengths: tokens per item, (n,), on the CPU.
        size: items per batch.
        generator: on the CPU; None for no shuffling.
    """
    if generator is None:
        return lengths.argsort(stable=True)
    order = torch.randperm(len(lengths), generator=generator)
    pieces = [part[lengths[part].argsort(stable=True)] for part in order.split(20 * size)]
    batches = [batch for piece in pieces for batch in piece.split(size)]
    # The short batch stays last, as the order is cut into parts of equal size.
    whole = [batch for batch in batches if len(batch) == size]
    rest = [batch for batch in batches if len(batch) < size]
    shuffled = [whole[place] for place in torch.randperm(len(whole), generator=generator).tolist()]
    return torch.cat([*shuffled, *rest])


def sizes_of_one_length(lengths: Tensor, size: int) -> list[int]:
    """Returns the sizes of batches, each at most `size`, within which all items are equally long.

    Args:
        lengths: tokens per item in the order of the batches, (n,).
        size: items per batch.
    """
    counts = torch.unique_consecutive(lengths, return_counts=True)[1].tolist()
    return [min(size, count - start) for count in counts for start in range(0, count, size)]
