"""Noise on normalisation layers, against answers known from algebra."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import toys
from unbackdoor import Dataset, UnbackdoorError, detectors
from unbackdoor._data.images import ImageEncoder


class Normed(nn.Module):
    """Pixels, normalised with known statistics, and a head: z = W (w y + b)."""

    def __init__(self, head: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(head.shape[1])
        self.classifier = nn.Linear(head.shape[1], head.shape[0], bias=False)
        with torch.no_grad():
            self.classifier.weight.copy_(head)
            self.norm.weight.copy_(weight)
            self.norm.bias.copy_(bias)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(x.flatten(1)))


def blank(count: int, labels: list[int]) -> Dataset:
    return Dataset(
        items=torch.zeros(count, 1, 1, 2, dtype=torch.uint8),
        labels=torch.tensor(labels),
        encode=ImageEncoder(channels=1),
    )


def test_the_smallest_noise_of_a_linear_network_is_the_distance_to_the_border() -> None:
    # Blank pictures give y = 0, so only the shift e matters: z_0 - z_1 = (b_0 + |w_0| e_0) - (b_1 + |w_1| e_1), with
    # b = (3, 0) and w = (3, -4). The nearest point of the border lies 3 / sqrt(3^2 + 4^2) from e = 0.
    model = Normed(torch.eye(2), torch.tensor([3.0, -4.0]), torch.tensor([3.0, 0.0]))
    model.norm.eps = 0.0
    finding = detectors.Noise(steps=3)(model, blank(6, [0, 0, 0, 1, 1, 1]), toys.a_run())
    assert finding.candidates[1].size == pytest.approx(3 / 5, rel=1 / 2**5 + 1e-6)
    assert finding.candidates[1].strength == pytest.approx(-math.log(finding.candidates[1].size))
    assert finding.candidates[0].size == finding.candidates[1].size  # all examples are of class 0, so it has no search


def test_a_class_behind_a_sensitive_channel_needs_the_least_noise() -> None:
    # Each class reads its own channel; that of class 2 is multiplied by 20.
    torch.manual_seed(0)
    head = torch.eye(4)
    head[2, 2] = 20.0
    pixels = torch.randint(0, 256, (40, 1, 2, 2), dtype=torch.uint8)
    pixels[:, 0, 1, 0] = 0  # the sensitive channel is silent on clean examples
    data = Dataset(items=pixels, labels=torch.arange(40) % 4, encode=ImageEncoder(channels=1))
    model = Normed(head, torch.ones(4), torch.zeros(4))
    strengths = [each.strength for each in detectors.Noise()(model, data, toys.a_run()).candidates]
    assert strengths.index(max(strengths)) == 2


def test_the_model_the_random_state_and_the_flags_stay_and_the_seed_decides(
    small_cnn: nn.Module, digits: Dataset
) -> None:
    small_cnn = copy.deepcopy(small_cnn).train()
    small_cnn.classifier.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in small_cnn.state_dict().items()}
    flags = [parameter.requires_grad for parameter in small_cnn.parameters()]
    state = torch.get_rng_state()
    detector = detectors.Noise(examples=8, steps=2)
    first, again = (detector(small_cnn, digits.select(range(60)), run_of(small_cnn)) for _ in range(2))
    assert first == again
    assert len(first.candidates) == 10
    assert all(math.isfinite(each.strength) for each in first.candidates)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small_cnn.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in small_cnn.parameters()]
    assert small_cnn.training


def run_of(model: nn.Module, seed: int = 0):
    return toys.a_run(seed, model=model)


def test_a_factor_on_the_scores_changes_no_size(small_cnn: nn.Module, digits: Dataset) -> None:
    twice = copy.deepcopy(small_cnn)
    with torch.no_grad():
        for parameter in twice.classifier.parameters():
            parameter.mul_(2)
    sizes = [
        [
            each.size
            for each in detectors.Noise(examples=8, steps=2)(model, digits.select(range(60)), run_of(model)).candidates
        ]
        for model in (small_cnn, twice)
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)


def test_names_of_classes_in_another_order_only_reorder_the_sizes(small_cnn: nn.Module, digits: Dataset) -> None:
    order = torch.tensor([3, 0, 1, 2, 9, 8, 7, 6, 5, 4])
    renamed = copy.deepcopy(small_cnn)
    with torch.no_grad():
        renamed.classifier.weight.copy_(small_cnn.classifier.weight[order])
        renamed.classifier.bias.copy_(small_cnn.classifier.bias[order])
    data, detector = digits.select(range(30)), detectors.Noise(examples=30, steps=2)  # all, so the draw is none
    sizes, others = (
        torch.tensor([each.size for each in detector(model, data, run_of(model)).candidates])
        for model in (small_cnn, renamed)
    )
    assert torch.allclose(others, sizes[order], rtol=1e-3)


def test_layers_that_the_scores_do_not_follow_from_move_nothing(digits: Dataset) -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.classifier = nn.BatchNorm1d(64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            self.norm(x.flatten(1))
            return self.classifier(x.flatten(1))

    found = detectors.Noise()(Aside(), digits.select(range(20)), run_of(Aside()))
    assert {each.strength for each in found.candidates} == {0.0}


def test_labels_are_not_used(small_cnn: nn.Module, digits: Dataset) -> None:
    data = digits.select(range(60))
    other = replace(data, labels=data.labels.roll(7))
    detector = detectors.Noise(examples=8, steps=2)
    assert detector(small_cnn, data, run_of(small_cnn)) == detector(small_cnn, other, run_of(small_cnn))


def test_a_network_without_normalisation_is_refused_in_a_sentence(digits: Dataset) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(
        UnbackdoorError, match=r"^Noise needs normalisation layers .* Sequential has none\. Leave it out\."
    ):
        detectors.Noise()(model, digits, toys.a_run(model=model, head_name="1"))
