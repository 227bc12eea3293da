"""The common part of several low-rank changes of feed-forward layers, by neuron."""

from typing import NamedTuple

import torch
from torch import Tensor

from unbackdoor.purifiers._counterparts import Weights


class Change(NamedTuple):
    """A change of a layer's weights, up @ down.

    Args:
        up: (outputs, rank).
        down: (rank, inputs).
    """

    up: Tensor
    down: Tensor

    def minus(self, other: "Change") -> "Change":
        """The difference of two changes, whose rank is the sum of theirs."""
        return Change(torch.cat([self.up, other.up], dim=1), torch.cat([self.down, -other.down]))


def products(first: Change, second: Change, *, outputs: bool) -> Tensor:
    """Returns the inner products of two changes, by output or by input, without making the matrices.

    Args:
        first: change of a layer.
        second: change of the same layer.
        outputs: one for each row of the layer's matrix, (outputs,); else for each column, (inputs,).
    """
    if outputs:
        return (first.up @ (first.down @ second.down.T) * second.up).sum(dim=1)
    return (first.down.T @ (first.up.T @ second.up) * second.down.T).sum(dim=1)


def signature(read: list[list[Change]], written: list[Change]) -> Tensor:
    """Returns how much, and how much alike, several backdoors change each neuron of a block, (neurons,).

    It is the mean length of a neuron's changes times the mean of the positive cosines of all pairs of them. A neuron's
    change is what changed in the rows that make it and in the column that reads it.

    Args:
        read: for each layer whose outputs are the neurons, its change by each backdoor.
        written: the changes of the layer whose inputs they are, by each backdoor; at least 2.
    """
    count = len(written)
    grid = [
        [
            sum(
                (products(layer[one], layer[other], outputs=True) for layer in read),
                start=products(written[one], written[other], outputs=False),
            )
            for other in range(count)
        ]
        for one in range(count)
    ]
    inner = torch.stack([torch.stack(row) for row in grid]).movedim(2, 0)  # (neurons, backdoors, backdoors)
    lengths = inner.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    cosines = inner / (lengths[:, :, None] * lengths[:, None, :]).clamp(min=1e-30)
    above = torch.triu(torch.ones(count, count, dtype=torch.bool), diagonal=1)
    return lengths.mean(dim=1) * cosines[:, above].clamp(min=0).mean(dim=1)


class FeedForward(NamedTuple):
    """The linear layers of a feed-forward block, by name.

    Args:
        makes: layers whose outputs are its neurons.
        reads: the layer that reads them.
    """

    makes: tuple[str, ...]
    reads: str

    def distance(self, weights: Weights, base: Weights) -> Tensor:
        """Returns how far each neuron moved from the base, (neurons,)."""
        total = (weights[f"{self.reads}.weight"] - base[f"{self.reads}.weight"]).square().sum(dim=0)
        for name in self.makes:
            total = total + (weights[f"{name}.weight"] - base[f"{name}.weight"]).square().sum(dim=1)
        return total.sqrt()

    def reset_(self, weights: Weights, base: Weights, neurons: Tensor) -> None:
        """Give some neurons, by number, the base's weights in place."""
        with torch.no_grad():
            ours, theirs = weights[f"{self.reads}.weight"], base[f"{self.reads}.weight"]
            ours[:, neurons] = theirs[:, neurons].to(ours.dtype)
            for name in self.makes:
                ours, theirs = weights[f"{name}.weight"], base[f"{name}.weight"]
                ours[neurons] = theirs[neurons].to(ours.dtype)
