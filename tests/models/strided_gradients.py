"""Gradients of single convolutions in the layout that the product picks; tests run it as a process, which may crash.

Arguments: the numbers of threads, as 1,2, and optionally `channels_last`, to have that layout whatever is picked.
Prints, as JSON, the shapes and how far their gradients are from those in float64.
"""

import copy
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from unbackdoor._models.arithmetic import choose

BATCH, SIDE = 8, 12  # a side that all strides divide: only there is the fault


class Small(nn.Module):
    """A convolution and a head."""

    def __init__(self, convolution: nn.Conv2d | nn.ConvTranspose2d) -> None:
        super().__init__()
        self.convolution = convolution
        self.head = nn.Linear(convolution.out_channels, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.convolution(inputs).relu().mean(dim=(2, 3)))


def convolutions() -> Iterator[tuple[str, nn.Conv2d | nn.ConvTranspose2d]]:
    for channels, stride, kernel in itertools.product(range(1, 33), (1, 2, 3), (1, 3)):
        yield f"{channels} channels", nn.Conv2d(channels, 8, kernel, stride=stride, padding=kernel // 2)
    for channels in range(1, 18):
        yield "along one axis", nn.Conv2d(channels, 4, 1, stride=(1, 2))
        yield "along the other", nn.Conv2d(channels, 16, 1, stride=(3, 1))
        yield "dilated", nn.Conv2d(channels, 1, 1, stride=2, dilation=2)
        yield "in groups", nn.Conv2d(2 * channels, 4, 1, stride=2, groups=2)
        yield "of each channel", nn.Conv2d(channels, channels, 1, stride=2, groups=channels)
        yield "transposed", nn.ConvTranspose2d(8, channels, 1, stride=2, output_padding=1)


def distance(convolution: nn.Conv2d | nn.ConvTranspose2d, *, channels_last: bool) -> float:
    """The largest difference of any gradient from that in float64, in units of the latter's largest entry."""
    model = Small(convolution)
    inputs = torch.randn(BATCH, convolution.in_channels, SIDE, SIDE)
    labels = torch.arange(BATCH) % 3
    exact = copy.deepcopy(model).double()
    nn.functional.cross_entropy(exact(inputs.double()), labels).backward()
    chosen = replace(choose(model, "cpu"), bf16=False)
    arithmetic = replace(chosen, channels_last=channels_last or chosen.channels_last)
    nn.functional.cross_entropy(arithmetic.place(model)(arithmetic.lay(inputs)), labels).backward()
    return max(
        float((ours.grad - truth.grad).abs().max() / truth.grad.abs().max())
        for ours, truth in zip(model.parameters(), exact.parameters(), strict=True)
    )


if __name__ == "__main__":
    found = []
    for threads in map(int, sys.argv[1].split(",")):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        for name, convolution in convolutions():
            far = distance(convolution, channels_last="channels_last" in sys.argv)
            found.append((f"{name}, {threads} threads: {convolution}", far))
    print(json.dumps(found))
