"""What can be pruned, and how: found by kind, order and running; folded away; taken back where accuracy suffers."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from conftest import SmallCNN
from unbackdoor import Dataset, UnbackdoorError, archs, purifiers
from unbackdoor._models import probe
from unbackdoor._precision import choose
from unbackdoor._units import (
    as_far_as_accurate_,
    channels,
    feed_forward,
    mean_activation,
    norms,
    scaled_,
    silence_,
)


def test_channels_follow_module_order(small_cnn: SmallCNN) -> None:
    features = small_cnn.features
    found = channels(small_cnn, purifiers.CLP())
    assert [(unit.convolution, unit.norm) for unit in found] == [
        (features[0], features[1]),
        (features[4], features[5]),
    ]
    assert list(norms(small_cnn, purifiers.ANP())) == ["features.1", "features.5"]


def test_a_norm_of_another_width_belongs_to_no_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1), nn.BatchNorm2d(2))
    assert [unit.name for unit in channels(model, purifiers.CLP())] == ["3"]


def test_a_model_without_batchnorm_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(
        UnbackdoorError,
        match=r"^ANP needs BatchNorm layers with weights and statistics; Sequential has none\. Try fine-pruning\.$",
    ):
        norms(model, purifiers.ANP())


def test_feed_forward_blocks_are_found_by_running(digits: Dataset, small_cnn: SmallCNN) -> None:
    vit = archs.build("vit", classes=list("0123456789"), channels=1, image_size=8, width=4)
    found = feed_forward(vit, probe(vit, digits))
    assert len(found) == 6
    assert {(layer.in_features, layer.out_features) for layer in found} == {(24, 12)}
    assert feed_forward(small_cnn, probe(small_cnn, digits)) == []


def test_mean_activation_by_hand(digits: Dataset) -> None:
    class Signed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(-x.flatten(1))

    data, model = digits.select(range(300)), Signed()
    expected = data.encode(data.items).flatten(1).abs().mean(dim=0)
    found = mean_activation(model, model.last, data, choose(model, "cpu", "fp32"))
    assert torch.allclose(found.float(), expected, atol=1e-5)
    assert not model.last._forward_pre_hooks


def test_a_silenced_channel_says_nothing_and_without_bias_a_constant() -> None:
    norm = nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    inputs = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    silence_(norm, torch.tensor([True, False, False]))
    silence_(norm, torch.tensor([False, True, False]), bias=False)
    output = norm(inputs)
    assert (output[:, 0] == 0).all()
    assert (output[:, 1] == 2).all()
    assert output[:, 2].std() > 0


def test_masks_and_noise_scale_the_weight() -> None:
    norm = nn.BatchNorm2d(2)
    (scale,) = scaled_([norm], "weight")
    assert torch.equal(norm.weight, torch.ones(2))
    scale.mask.data.copy_(torch.tensor([0.5, 1.0]))
    scale.noise.data.copy_(torch.tensor([0.25, -1.0]))
    assert torch.equal(norm.weight, torch.tensor([0.75, 0.0]))


def test_pruning_stops_before_the_stage_that_hurts() -> None:
    weight = nn.Parameter(torch.ones(4))

    def drop(place: int) -> None:
        weight[place] = 0

    kept = as_far_as_accurate_([weight], [partial(drop, place) for place in range(4)], lambda: weight.sum() >= 2)
    assert kept == 2
    assert weight.tolist() == [0, 0, 1, 1]
