"""Detectors that search pixels: what they find in models whose shortcut is known by construction."""

import pytest
import torch
from torch import nn

from toys import a_run
from unbackdoor import Dataset, ImageEncoder
from unbackdoor._detection.finding import Detector
from unbackdoor.detectors import LowFrequencyPattern, Pattern, Warp


class Weighted(nn.Module):
    """Scores that are linear in the pixels, and a last class whose score is 10 for all pictures."""

    def __init__(self, directions: torch.Tensor) -> None:
        super().__init__()
        self.classifier = nn.Linear(64, len(directions) + 1)
        self.classifier.weight.data = torch.cat([directions, torch.zeros(1, 64)])
        self.classifier.bias.data = torch.tensor([0.0] * len(directions) + [10.0])
        self.double()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores of (batch, 1, 8, 8) pixels."""
        return self.classifier(images.flatten(1) - 0.5)


def grey_noise(count: int) -> Dataset:
    """Pictures of 8x8 pixels of faint noise around a middle grey."""
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(118, 138, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Dataset(items=items, labels=torch.arange(count) % 6, encode=ImageEncoder(channels=1))


@pytest.mark.parametrize("detector", [Pattern(batch_size=10), LowFrequencyPattern(share=0.9, batch_size=10)])
def test_the_class_with_a_strong_direction_has_the_smallest_pattern(detector: Detector) -> None:
    # Cosines across the rows, one for each class: orthogonal, so that each class's smallest pattern is along its own.
    columns = torch.arange(8) + 0.5
    waves = torch.stack([torch.cos(torch.pi * frequency * columns / 8) for frequency in range(1, 7)])
    directions = waves[:, None, :].expand(6, 8, 8).flatten(1).clone()
    directions[5] *= 5
    candidates = detector(Weighted(directions), grey_noise(60), a_run()).candidates
    strongest = max(candidates[:6], key=lambda candidate: candidate.strength)
    assert strongest.target == 5
    assert strongest.trigger is not None
    pattern = strongest.trigger.arrays["pattern"]
    assert torch.cosine_similarity(pattern.flatten(), directions[5], dim=0) > 0.9
    closed_form = 255 * 10 / float(directions[5].norm()) / 8  # |d| = 10 / |w|, over the root of 64 pixels
    assert strongest.size == pytest.approx(closed_form, rel=0.2)
    assert strongest.size == pytest.approx(float(255 * pattern.square().mean().sqrt()), rel=1e-3)


class Centre(nn.Module):
    """Says in which third of the width the bright pixels lie."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(1, 3)
        self.classifier.weight.data = torch.tensor([[-20.0], [0.0], [20.0]])
        self.classifier.bias.data = torch.tensor([-4.0, 0.0, -4.0])
        self.double()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores of (batch, 1, 9, 9) pixels."""
        columns = torch.linspace(-1, 1, 9, dtype=images.dtype)
        brightness = images.sum(dim=(1, 2)) + 1e-6  # (batch, width)
        return self.classifier(((brightness * columns).sum(dim=1) / brightness.sum(dim=1))[:, None])


def test_the_smallest_warp_shifts_the_bright_pixels_to_where_a_class_looks() -> None:
    items = torch.zeros(30, 1, 9, 9, dtype=torch.uint8)
    items[:, :, 2:7, 3:6] = 200  # in the middle: class 1
    clean = Dataset(items=items, labels=torch.arange(30) % 3, encode=ImageEncoder(channels=1))
    left, middle, right = Warp(batch_size=10)(Centre(), clean, a_run()).candidates
    assert middle.size < 0.2  # there already
    for candidate in (left, right):
        assert 0.3 < candidate.size < 2  # the edge of the third lies 0.2 of a half side of 4 pixels away
        shifted = candidate.trigger.stamp(clean.items).double() / 255
        assert Centre()(shifted).argmax(dim=1).tolist() == [candidate.target] * 30


def test_patterns_of_low_frequency_are_smooth() -> None:
    found = LowFrequencyPattern(share=0.1, steps=5, batch_size=10)(
        Weighted(torch.randn(6, 64)), grey_noise(60), a_run()
    )
    pattern = found.candidates[0].trigger.arrays["pattern"]
    assert pattern.std() < 1e-6  # a tenth of 8 cosines is one: the constant
    assert pattern.abs().mean() > 0
