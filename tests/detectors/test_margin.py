"""Margins over features inside the network, against answers known from algebra."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import toys
from unbackdoor import Dataset, detectors
from unbackdoor._data.images import ImageEncoder


def linear(weight: torch.Tensor) -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], weight.shape[0], bias=False)).double()
    with torch.no_grad():
        model[1].weight.copy_(weight)
    return model


def pictures(count: int, side: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 1, side), dtype=torch.uint8, generator=generator)
    return Dataset(items=pixels, labels=torch.arange(count) % 2, encode=ImageEncoder(channels=1))


def test_the_margin_of_a_linear_model_is_that_of_the_nearest_point_of_the_ball() -> None:
    # z_1 - z_0 = w x. Its maximum over x + s d with a root mean square of d of at most r is w x + r sqrt(D) |s w|.
    weight = torch.tensor([[0.0] * 6, [0.5, -1.0, 2.0, 0.0, 1.0, -3.0]])
    data, model = pictures(40, 6), linear(weight)
    pixels = data.inputs(slice(None)).flatten(1).double()
    plain, spread = pixels @ weight[1].double(), pixels.std(dim=0, correction=0)
    reach = 0.7 * math.sqrt(6) * (spread * weight[1]).norm()
    found = detectors.Margin(starts=40, budget=0.7)(model, data, toys.a_run(head_name="1")).candidates
    assert math.exp(found[1].strength) == pytest.approx(float((plain + reach)[plain < 0].mean()), rel=1e-4)
    assert math.exp(found[0].strength) == pytest.approx(float((reach - plain)[plain > 0].mean()), rel=1e-4)


def test_a_direction_that_no_other_class_reads_gives_its_class_the_largest_margin() -> None:
    weight = torch.eye(6)[:5]
    weight[3, 5] = 3.0
    found = detectors.Margin(starts=20)(linear(weight), pictures(60, 6), toys.a_run(head_name="1")).candidates
    strengths = [each.strength for each in found]
    assert strengths.index(max(strengths)) == 3


def strengths(model: nn.Module, data: Dataset) -> list[float]:
    found = detectors.Margin(starts=3, steps=6)(model, data, toys.a_run(model=model))
    return [each.strength for each in found.candidates]


@pytest.fixture
def few(digits: Dataset) -> Dataset:
    return digits.select(range(60))


def test_a_factor_on_the_scores_moves_all_strengths_alike(small_cnn: nn.Module, few: Dataset) -> None:
    twice = copy.deepcopy(small_cnn)
    with torch.no_grad():
        for parameter in twice.classifier.parameters():
            parameter.mul_(2)
    expected = [strength + math.log(2) for strength in strengths(small_cnn, few)]
    assert strengths(twice, few) == pytest.approx(expected, abs=1e-3)


def test_an_order_of_channels_changes_nothing(small_cnn: nn.Module, few: Dataset) -> None:
    order = torch.arange(31, -1, -1)
    turned = copy.deepcopy(small_cnn)
    convolution, norm = turned.features[4], turned.features[5]
    with torch.no_grad():
        for layer, names in (
            (convolution, ("weight", "bias")),
            (norm, ("weight", "bias", "running_mean", "running_var")),
        ):
            for name in names:
                getattr(layer, name).copy_(getattr(layer, name)[order].clone())
        read = turned.classifier.weight.view(10, 32, 16)
        turned.classifier.weight.copy_(read[:, order].reshape(10, -1))
    assert strengths(turned, few) == pytest.approx(strengths(small_cnn, few), abs=1e-3)


def test_labels_are_not_used_and_everything_stays_as_it_was(small_cnn: nn.Module, few: Dataset) -> None:
    before = {name: tensor.clone() for name, tensor in small_cnn.state_dict().items()}
    state = torch.get_rng_state()
    assert strengths(small_cnn, few) == strengths(small_cnn, replace(few, labels=few.labels.roll(7)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small_cnn.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small_cnn.modules())


def test_a_stage_that_the_scores_do_not_follow_from_is_not_taken(digits: Dataset) -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.classifier = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.conv(x)
            return self.classifier(x.flatten(1))

    model, data = Aside(), digits.select(range(40))
    alone = nn.Sequential(nn.Flatten(), copy.deepcopy(model.classifier))
    detector = detectors.Margin(starts=3)
    found, expected = (
        detector(network, data, toys.a_run(model=network, head_name=name))
        for network, name in ((model, "classifier"), (alone, "1"))
    )
    assert found == expected


def test_a_class_that_holds_all_examples_is_as_weak_as_can_be() -> None:
    model = linear(torch.tensor([[1.0] * 6, [0.0] * 6]))
    found = detectors.Margin()(model, pictures(10, 6), toys.a_run(head_name="1")).candidates
    assert found[0].strength == pytest.approx(math.log(1e-3))
