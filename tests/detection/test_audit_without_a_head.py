"""Audits of models whose class scores no linear layer makes."""

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import Dataset, audit, detectors


class Multiplied(nn.Module):
    """A linear layer as a product of its own, which nothing can find."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.matrix, self.offset = nn.Parameter(layer.weight.detach().T.clone()), nn.Parameter(layer.bias.detach())

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.matrix + self.offset


class Cosines(nn.Module):
    """Scores that are cosines with one vector for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(3, 8, generator=torch.Generator().manual_seed(2)))

    def forward(self, features: Tensor) -> Tensor:
        return 9 * nn.functional.normalize(features) @ nn.functional.normalize(self.vectors).T


def trained(head: nn.Module, data: Dataset) -> nn.Sequential:
    """A small network that classifies the pictures with some head."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        network = nn.Sequential(*body, head)
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(data.inputs(slice(None))), data.labels).backward()
        optimizer.step()
    return network.eval()


@pytest.fixture
def pictures() -> Dataset:
    levels = torch.randint(256, (24, 3, 12, 12), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    levels[::3, 0] //= 4
    levels[1::3, 1] //= 4
    return Dataset(items=levels, labels=torch.arange(24) % 3, classes=("a", "b", "c"), name="pictures")


TESTS = (detectors.Patch(steps=4), detectors.Margin(starts=2, steps=3), detectors.Noise(examples=8))


def test_the_findings_are_those_of_the_same_function_with_a_linear_head(pictures: Dataset) -> None:
    network = trained(nn.Linear(8, 3), pictures)
    same = nn.Sequential(*list(network)[:-1], Multiplied(network[-1]))
    found = []
    for model in (network, same):
        result = audit(model, pictures, detectors=TESTS, device="cpu", precision="fp32").to_json()
        found.append({finding["detector"]: finding for finding in result["findings"]})
    plain, multiplied = found
    assert plain.keys() == multiplied.keys() >= {"patch", "margin"}
    for name, finding in plain.items():
        assert [each["target"] for each in finding["classes"]] == [
            each["target"] for each in multiplied[name]["classes"]
        ]
        for ours, theirs in zip(finding["classes"], multiplied[name]["classes"], strict=True):
            assert ours["moved"] == theirs["moved"]


def test_cosines_are_audited(pictures: Dataset) -> None:
    result = audit(trained(Cosines(), pictures), pictures, detectors=TESTS, device="cpu", precision="fp32").to_json()
    assert result["classes"] == 3
    assert {"patch", "margin"} <= {finding["detector"] for finding in result["findings"]}
