"""Shortcuts on held-out examples, counted by hand, and intervals against scipy."""

import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from unbackdoor import Dataset, ImageEncoder, Trigger
from unbackdoor._detection.finding import Candidate
from unbackdoor._detection.judging import ExactShare, HeldOut
from unbackdoor._models.arithmetic import choose
from unbackdoor.attacks.inverted import Inverted


@pytest.mark.parametrize(("count", "n"), [(0, 59), (36, 41), (13, 13), (1, 250)])
def test_exact_intervals_are_scipys(count: int, n: int) -> None:
    expected = binomtest(count, n).proportion_ci(method="exact")
    assert ExactShare(count, n).interval == pytest.approx((expected.low, expected.high), abs=1e-4)


class Corner(nn.Module):
    """Class 1 where the first pixel is white, else class 0 for dark and class 2 for bright pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3, bias=True)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[0.0, -1, -1, -1], [30, 0, 0, 0], [0, 1, 1, 1]]))
            self.head.bias.copy_(torch.tensor([1.5, -20.0, -1.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


def test_only_examples_of_other_classes_count_by_label_and_by_answer() -> None:
    pixels = torch.zeros(6, 1, 2, 2, dtype=torch.uint8)
    pixels[2:4] = 255 // 2 + 60  # bright, but the first pixel is not white
    pixels[2:4, 0, 0, 0] = 0
    pixels[4:, 0, 0, 0] = 255  # class 1 already
    labels = torch.tensor([0, 1, 2, 2, 1, 0])  # row 1 is labelled 1; row 5 is answered 1
    data = Dataset(items=pixels, labels=labels, encode=ImageEncoder(), name="corner")
    model = Corner().eval()
    held_out = HeldOut.of(model, data, choose(model, "cpu", "fp32"))
    assert held_out.predicted.tolist() == [0, 0, 2, 2, 1, 1]
    mask = torch.zeros(1, 2, 2)
    mask[0, 0, 0] = 1
    trigger = Trigger(Inverted(target=1), {"mask": mask, "pattern": torch.ones(1, 2, 2)})
    assert held_out.moved(trigger, Candidate(target=1, strength=0)) == ExactShare(3, 3)  # rows 0, 2, 3
    assert held_out.moved(trigger, Candidate(target=1, strength=0, sources=(2,))) == ExactShare(2, 2)
    weak = Trigger(Inverted(target=1), {"mask": mask * 0.5, "pattern": torch.ones(1, 2, 2)})
    assert held_out.moved(weak, Candidate(target=1, strength=0)) == ExactShare(0, 3)  # 30 / 2 - 20 < 0
    only = data.select(torch.tensor([1, 4]))
    assert HeldOut.of(model, only, choose(model, "cpu", "fp32")).moved(trigger, Candidate(target=1, strength=0)).n == 0
