"""The stand-in finds a backdoor that was built in by hand: a shortcut from one pixel into one class."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from unbackdoor import Dataset, purifiers
from unbackdoor._precision import choose
from unbackdoor._purify import Run
from unbackdoor._universal import stand_in, success_of


class Backdoored(nn.Module):
    """Classes take large evidence each, except class 3, which the first pixel decides alone."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 10)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.last.weight.copy_(torch.randn(10, 64, generator=generator) * 0.1)
            self.last.bias.zero_()
            self.last.weight[3, 0] = 8

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.flatten(1))


def test_the_backdoor_is_found(digits: Dataset) -> None:
    data = replace(digits.select(range(200)), encode=replace(digits.encode, mean=(0.0,), std=(1.0,)))
    model = Backdoored()
    run = Run(generator=torch.Generator().manual_seed(0), arithmetic=choose(model, "cpu", "fp32"), head_name="last")
    found = stand_in(model, data, run, purifiers.BNA(), steps=100)
    assert found.target == 3
    assert found.success > 0.9
    assert success_of(found, model, data, run) > 0.9
    assert found.perturbation.shape == (1, 1, 8, 8)
    assert int(found.perturbation.abs().argmax()) == 0
    assert all(parameter.grad is None for parameter in model.parameters())
