"""The temperature of answers, by formula, and models whose answers are taken at it."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import toys
from unbackdoor import Dataset, ImageEncoder, purifiers
from unbackdoor._models.head import Head
from unbackdoor.purifiers._calibrated import HOTTEST, calibrated_temperature, softened


class Sure(nn.Module):
    """Answers the class 1 for a white picture and 0 for a black one, always with the scores +margin and -margin."""

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = nn.Parameter(torch.tensor(margin, dtype=torch.float64))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        white = self.margin * (2 * pixels.mean(dim=(1, 2, 3)) - 1)
        return torch.stack([-white, white], dim=1)


def pictures(wrong: int, count: int = 40) -> Dataset:
    """Black and white pictures by turns, the first `wrong` of them with the other label."""
    labels = torch.arange(count) % 2
    pixels = (255 * labels)[:, None, None, None].expand(-1, 1, 4, 4).to(torch.uint8)
    labels = torch.where(torch.arange(count) < wrong, 1 - labels, labels)
    return Dataset(items=pixels, labels=labels, encode=ImageEncoder(), name="pictures")


@pytest.mark.parametrize(("margin", "wrong"), [(3.0, 8), (1.5, 8), (6.0, 4)])
def test_it_is_the_temperature_at_which_confidence_is_accuracy(margin: float, wrong: int) -> None:
    """With one confidence for all, the cross-entropy is smallest where that is the share of right answers."""
    right = 1 - wrong / 40
    expected = 2 * margin / math.log(right / (1 - right))
    found = calibrated_temperature(Sure(margin), pictures(wrong), toys.a_run().arithmetic)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("margin", "wrong", "expected"), [(0.1, 8, 1.0), (3.0, 0, 1.0), (3.0, 20, HOTTEST)])
def test_it_never_sharpens_and_has_an_end(margin: float, wrong: int, expected: float) -> None:
    found = calibrated_temperature(Sure(margin), pictures(wrong), toys.a_run().arithmetic)
    assert found == pytest.approx(expected)


def test_examples_without_a_label_do_not_count() -> None:
    some = pictures(8)
    more = replace(some, items=some.pixels.repeat(2, 1, 1, 1), labels=torch.cat([some.labels, -torch.ones(40).long()]))
    run = toys.a_run()
    assert calibrated_temperature(Sure(3.0), more, run.arithmetic) == calibrated_temperature(
        Sure(3.0), some, run.arithmetic
    )


def test_a_step_is_that_of_the_network_with_the_smaller_head() -> None:
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    large = copy.deepcopy(small)
    with torch.no_grad():
        for parameter in large[2].parameters():
            parameter.mul_(7)
    inputs, labels = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])

    def step(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()

    step(small)
    with softened(large, Head("2", large[2]), 7.0):
        step(large)
        torch.testing.assert_close(large(inputs), small(inputs))
    torch.testing.assert_close(large(inputs), 7 * small(inputs))
    torch.testing.assert_close(large[0].weight, small[0].weight)


class Negative:
    """A trigger that is known: the negative of the picture."""

    kind, target = "patch", 3

    def restart_(self) -> None:
        pass

    def step_(self, *_: object) -> None:
        pass

    def shown(self, pixels: torch.Tensor) -> torch.Tensor:
        return 1 - pixels


def test_unlearning_does_not_depend_on_the_length_of_the_head(backdoored: tuple, digits: Dataset) -> None:
    """The same function with scores three times as large comes out with scores three times as large."""
    kinds: Any = [[Negative()]]
    clean, results = digits.select(range(1000, 1064)), []
    for factor in (2.0, 6.0):
        model = copy.deepcopy(backdoored[0]).double()
        with torch.no_grad():
            for parameter in model.classifier.parameters():
                parameter.mul_(factor)
        suspect = copy.deepcopy(model).eval().requires_grad_(False)
        assert calibrated_temperature(suspect, clean, toys.a_run().arithmetic) > 1
        purifiers.AdaptiveUnlearning(epochs=2)._unlearn(model, suspect, kinds, clean, toys.a_run(), 0.02)
        with torch.no_grad():
            results.append(model.eval()(clean.encode(clean.pixels).double()))
            moved = results[-1] - suspect(clean.encode(clean.pixels).double())
            assert moved.abs().max() > 0.01 * factor
    torch.testing.assert_close(results[1], 3 * results[0], rtol=1e-4, atol=1e-4)
