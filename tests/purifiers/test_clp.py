"""CLP against numpy's singular values, without and with clean examples."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fixtures import SmallCNN
from unbackdoor import Dataset, UnbackdoorError, archs, purifiers, purify
from unbackdoor._models.units import channels
from unbackdoor.purifiers.clp import lipschitz_bounds


def test_the_bound_is_that_of_the_formula(small_cnn: SmallCNN) -> None:
    unit = channels(small_cnn, purifiers.CLP())[1]
    with torch.no_grad():
        unit.norm.running_var.uniform_(0.5, 2)
        unit.norm.weight.uniform_(-2, 2)
    expected = []
    for kernel, weight, variance in zip(
        unit.convolution.weight.detach().numpy(), unit.norm.weight, unit.norm.running_var, strict=True
    ):
        largest = np.linalg.svd(kernel.reshape(16, 9), compute_uv=False)[0]
        expected.append(largest * abs(weight.item()) / (variance.item() + 1e-5) ** 0.5)
    assert np.allclose(lipschitz_bounds(unit).detach().numpy(), expected, rtol=1e-5)


def planted(model: SmallCNN) -> SmallCNN:
    """One channel of 32 amplifies 50 times as much as the others do: more than 5 deviations above the mean."""
    with torch.no_grad():
        model.features[5].weight[7] = 50
        model.features[5].bias.fill_(0.1)
    return model


def test_without_data_only_the_planted_channel_goes(small_cnn: SmallCNN) -> None:
    result = purify(planted(small_cnn), None, purifiers.CLP(u=4.0))
    norm = result.model.features[5]
    assert (norm.weight == 0).nonzero().flatten().tolist() == [7]
    assert (norm.bias == 0).nonzero().flatten().tolist() == [7]
    assert torch.equal(result.model.features[1].weight, small_cnn.features[1].weight)
    assert result.record["clean"] is None
    assert result.record["notes"] == [
        "CLP pruned 1 of 48 channels, those more than 4 deviations above the mean of their layer."
    ]


def test_with_clean_data_u_is_chosen_on_held_out_examples(small_cnn: SmallCNN, digits: Dataset) -> None:
    model = planted(small_cnn)
    result = purify(model, digits.select(range(100)), purifiers.CLP(tolerance=1.0))
    assert result.record["clean"]["held_out"] == 20
    assert "more than 0 deviations" in result.record["notes"][0]  # nothing stops it
    assert result.model.features[5].weight[7] == 0


def test_nothing_pruned_is_a_warning(small_cnn: SmallCNN) -> None:
    warnings = purify(small_cnn, None, purifiers.CLP(u=9.0)).record["warnings"]
    assert warnings == [
        "CLP pruned nothing of 48 channels: none lies more than 9 deviations above the mean of its layer. Lower `u`, "
        "or give clean examples to choose it."
    ]


def test_what_clean_accuracy_takes_back_was_not_pruned(small_cnn: SmallCNN, digits: Dataset) -> None:
    """A channel far above its layer's mean, which all answers hang on: taking it away costs all accuracy."""
    made: Any = planted(purify(small_cnn, digits, purifiers.FineTuning(epochs=3, learning_rate=0.05), seed=0).model)
    with torch.no_grad():
        held = 32 * 16  # what the head reads, 16 places a channel
        made.classifier.weight[:, [place for place in range(held) if place // 16 != 7]] = 0
    model: Any = purify(made, digits, purifiers.LinearProbing(epochs=5, learning_rate=0.05), seed=0).model
    with torch.no_grad():
        model.classifier.weight[:, [place for place in range(held) if place // 16 != 7]] = 0
    result = purify(model, digits.select(range(200)), purifiers.CLP(tolerance=0.0))
    assert all(torch.equal(one, result.model.state_dict()[name]) for name, one in model.state_dict().items())
    assert result.record["notes"] == []
    assert (
        "CLP pruned nothing of 48 channels: clean accuracy on 40 held-out examples allows pruning none. Raise its "
        "`tolerance`."
    ) in result.record["warnings"]


def test_in_a_pre_activation_network_the_planted_channel_goes_and_no_innocent_one() -> None:
    """The planted channel's norm is registered before its convolution: by that order another would have gone."""
    torch.manual_seed(0)
    model = archs.build("preact-resnet18", classes=["a", "b"], channels=3, image_size=16, width=16)
    block = model.stages[1][0]
    with torch.no_grad():
        block.conv1.weight[5] *= 50  # read by bn2
        block.conv2.weight[9] *= 50  # read by a sum
    result = purify(model, None, purifiers.CLP(u=5.0))
    before = dict(model.named_modules())
    pruned = [
        (name, channel)
        for name, layer in result.model.named_modules()
        if isinstance(layer, nn.BatchNorm2d)
        for channel in (layer.weight != before[name].weight).nonzero().flatten().tolist()
    ]
    assert pruned == [("stages.1.0.bn2", 5)]
    assert result.record["notes"] == [
        "CLP leaves 8 BatchNorm layer(s) alone, which read no single convolution's output.",
        "CLP pruned 1 of 496 channels, those more than 5 deviations above the mean of their layer.",
    ]


def test_a_transformer_is_refused(small_vit: nn.Module) -> None:
    message = r"^CLP needs convolutions followed by BatchNorm with .*; ViTForImageClassification has none\. Try"
    with pytest.raises(UnbackdoorError, match=message):
        purify(small_vit, None, purifiers.CLP())


def test_a_convolution_alone_is_refused() -> None:
    with pytest.raises(
        UnbackdoorError,
        match=r"^CLP needs convolutions followed by BatchNorm with weights and statistics; Sequential has none\.",
    ):
        purify(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 2)), None, purifiers.CLP())
