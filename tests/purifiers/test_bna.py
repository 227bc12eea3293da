"""BNA: the divergence by torch's own, moments by hand, and which weights move."""

from typing import cast

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from fixtures import SmallCNN
from toys import a_run
from unbackdoor import Dataset, UnbackdoorError, purifiers, purify
from unbackdoor.purifiers.bna import divergence, moments


def test_divergence_is_that_of_normal_distributions() -> None:
    right, now = (
        (torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.1])),
        (torch.tensor([0.0, 3.0]), torch.tensor([1.0, 0.7])),
    )
    expected = kl_divergence(Normal(right[0], right[1].sqrt()), Normal(now[0], now[1].sqrt()))
    assert torch.allclose(divergence(right, now), expected)
    assert (divergence(right, right) == 0).all()


def test_moments_are_those_of_what_leaves_the_layer(small_cnn: SmallCNN, digits: Dataset) -> None:
    inputs = digits.encode(digits.items[:16])
    ((mean, variance),) = moments(
        small_cnn, inputs, [cast(nn.BatchNorm2d, small_cnn.features[1])], a_run(model=small_cnn)
    )
    output = small_cnn.features[:2](inputs)  # (16, 16, 8, 8)
    assert torch.allclose(mean, output.mean(dim=(0, 2, 3)), atol=1e-6)
    assert torch.allclose(variance, output.var(dim=(0, 2, 3), correction=0), atol=1e-4)
    assert not small_cnn.features[1]._forward_hooks


def test_only_scale_and_shift_of_batchnorm_move(small_cnn: SmallCNN, digits: Dataset) -> None:
    method = purifiers.BNA(epochs=2, batch_size=16, reverse_steps=5)
    result = purify(small_cnn, digits.select(range(60)), method, seed=0)
    before, after = small_cnn.state_dict(), result.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"features.{place}.{name}" for place in (1, 5) for name in ("weight", "bias")}
    assert result.record["notes"][0].startswith("Neural Cleanse: ")


def test_a_model_without_batchnorm_is_refused(digits: Dataset, small_vit: torch.nn.Module) -> None:
    with pytest.raises(
        UnbackdoorError,
        match=r"^BNA needs BatchNorm layers with weights and statistics; ViTForImageClassification has none\.",
    ):
        purify(small_vit, digits.select(range(60)), purifiers.BNA())
