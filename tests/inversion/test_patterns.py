"""Additive patterns: sizes by hand, the basis, the clamp, and a linear model whose smallest pattern is known."""

import pytest
import torch
from torch import nn

from toys import a_run
from unbackdoor import Dataset, ImageEncoder
from unbackdoor._inversion.patterns import AdditivePattern, cosines
from unbackdoor._inversion.smallest import SmallestSearch

FREE = AdditivePattern(torch.eye(4), torch.eye(4))


def test_the_size_is_the_root_mean_square_in_grey_levels() -> None:
    patterns = torch.zeros(3, 1, 4, 4)
    patterns[0] = -10 / 255
    patterns[1, 0, 0, 0] = 20 / 255  # one of 16 pixels: 20 / sqrt(16)
    assert FREE.size(patterns).tolist() == pytest.approx([10, 5, 0], abs=1e-3)


def test_the_low_frequency_basis_is_that_of_the_cosine_transform() -> None:
    scipy_fft = pytest.importorskip("scipy.fft")
    weights = torch.randn(2, 3, 3, 3)
    patterns = AdditivePattern(cosines(8, 3), cosines(6, 3)).bounded(0.05 * weights)
    transformed = torch.from_numpy(scipy_fft.dctn(patterns.numpy(), axes=(-2, -1), norm="ortho"))
    assert transformed[..., 3:, :].abs().max() < 1e-5
    assert transformed[..., :, 3:].abs().max() < 1e-5
    assert torch.allclose(patterns.square().mean(dim=(1, 2, 3)), (0.05 * weights).square().mean(dim=(1, 2, 3)))


def test_pixels_stay_in_their_range_and_saturated_ones_give_no_gradient() -> None:
    pattern = torch.tensor([[0.5, 0.5], [-0.5, -0.5]]).view(1, 1, 2, 2).requires_grad_(True)
    pixels = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).view(1, 1, 2, 2)
    triggered = FREE.applied(pattern, pixels)
    assert triggered.flatten().tolist() == pytest.approx([1.0, 0.6, 0.0, 0.3])
    triggered.sum().backward()
    assert pattern.grad is not None
    assert pattern.grad.flatten().tolist() == [0, 1, 0, 1]


class Linear(nn.Module):
    """Scores that are linear in the pixels."""

    def __init__(self, weight: torch.Tensor, bias: list[float]) -> None:
        super().__init__()
        self.classifier = nn.Linear(16, len(bias))
        self.classifier.weight.data, self.classifier.bias.data = weight, torch.tensor(bias)
        self.double()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores of (batch, 1, 4, 4) pixels."""
        return self.classifier(images.flatten(1))


def grey(levels: list[int]) -> Dataset:
    """Images of 4x4 pixels, each of one grey level."""
    items = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return Dataset(items=items, labels=torch.arange(len(levels)) % 2, encode=ImageEncoder(channels=1))


def search(steps: int) -> SmallestSearch:
    return SmallestSearch(
        family=FREE, steps=steps, batch_size=4, cost=0.01, success=1.0, patience=5, learning_rate=0.005
    )


def test_the_smallest_pattern_of_a_linear_model_is_along_the_difference_of_its_weights() -> None:
    weight = torch.zeros(2, 16)
    weight[1, :4] = torch.tensor([40.0, -30.0, 20.0, 10.0])
    model = Linear(weight, [5.0, 0.0])
    # Grey levels of 100 to 130: the scores of class 1 lie (130 / 255) * 40 - 5 above those of class 0 at most.
    clean = grey([100, 110, 120, 130])
    found = search(150)(model, clean, a_run())
    gap = 130 / 255 * 40 - 5
    closed_form = 255 * gap / float(weight[1].norm()) / 4  # |d| = gap / |w|, over the root of 16 pixels
    assert closed_form <= float(found.sizes[0]) <= 1.15 * closed_form
    pattern = found.parameters[0].flatten()
    assert torch.cosine_similarity(-pattern, weight[1].double(), dim=0) > 0.98
    assert pattern[4:].abs().max() < 0.02  # the pixels without weight stay as they are
    assert found.sizes[1] < 2  # all are of class 1 already


def test_the_same_seed_finds_the_same_patterns() -> None:
    model, clean = Linear(torch.randn(3, 16), [0.0, 0.0, 0.0]), grey([50, 100, 150, 200])
    first, second = (search(5)(model, clean, a_run(seed=1)) for _ in range(2))
    assert torch.equal(first.parameters, second.parameters)


class NotFinite(Linear):
    """Scores of class 1 that are not a number once a picture is changed."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores of (batch, 1, 4, 4) pixels."""
        scores = super().forward(images)
        return torch.stack([scores[:, 0], (images.flatten(1).var(dim=1) * -1e9).log()], dim=1)


def test_parameters_stay_finite_where_the_scores_are_not() -> None:
    model, clean = NotFinite(torch.randn(2, 16), [0.0, 0.0]), grey([50, 100, 150, 200])
    found = search(5)(model, clean, a_run())
    assert found.parameters.isfinite().all()
    assert not found.sizes.isnan().any()
