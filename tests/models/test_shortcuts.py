"""Skip connections are found by what is added, whether they are modules or not, and scaled while a block runs."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import archs
from unbackdoor._models.shortcuts import scaled, shortcuts

CLASSES = [str(label) for label in range(10)]


class Block(nn.Module):
    """A residual block as most libraries write it: its identity is not a module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        out += x
        return self.last(F.relu(out).flatten(1))


def test_the_identity_is_scaled_and_then_left_alone() -> None:
    model, x = Block(), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = model(x)
    assert shortcuts(model, x) == [None]
    with scaled(model, {0: 0.25}):
        weakened = model(x)
    expected = model.last(F.relu(model.conv(x) + 0.25 * x).flatten(1))
    assert torch.allclose(weakened, expected, atol=1e-6)
    assert torch.equal(model(x), plain)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(("arch", "count", "foldable"), [("resnet18", 8, [2, 4, 6]), ("preact-resnet18", 8, [])])
def test_residual_networks(arch: str, count: int, foldable: list[int]) -> None:
    model = archs.build(arch, classes=CLASSES, channels=1, image_size=8, width=2)
    found = shortcuts(model, torch.randn(2, 1, 8, 8))
    assert len(found) == count
    assert [number for number, norm in enumerate(found) if norm is not None] == foldable
    if foldable:
        assert found[2] is model.stages[1][0].shortcut[1]


def test_a_transformer_has_two_per_layer(small_vit: nn.Module) -> None:
    assert shortcuts(small_vit, torch.randn(2, 1, 8, 8)) == [None] * 12


class Added(nn.Module):
    """A sum written as the case says, of h and a convolution of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.stem, self.conv = how, nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.last = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        if self.how == "other=":
            h = torch.add(h, other=self.conv(h))
        elif self.how == "input=":
            h = torch.add(input=h, other=self.conv(h))
        elif self.how == "onto the branch":
            h = self.conv(h).add_(h)
        else:
            skip = h.clone()
            skip += self.conv(h)
            h = skip
        return self.last(h.flatten(1))


@pytest.mark.parametrize("how", ["other=", "input=", "onto the branch", "onto the skip"])
def test_however_it_is_added(how: str) -> None:
    model, x = Added(how), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert shortcuts(model, x) == [None]
    h = model.stem(x)
    with scaled(model, {0: 0.25}):
        weakened = model(x)
    assert torch.allclose(weakened, model.last((0.25 * h + model.conv(h)).flatten(1)), atol=1e-6)
    weakened.sum().backward()  # and a gradient flows
    assert model.stem.weight.grad is not None


def test_attention_and_transposed_convolutions_are_layers() -> None:
    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.back = nn.ConvTranspose1d(8, 8, 3, padding=1)
            self.last = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = x.flatten(1, 2)  # (batch, 8, 8)
            h = h + self.attention(h, h, h)[0]
            h = h + self.back(h)
            return self.last(h.flatten(1))

    assert shortcuts(Attentive(), torch.randn(2, 1, 8, 8)) == [None, None]
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layers = nn.Sequential(nn.Flatten(1, 2), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    model = nn.Sequential(layers, nn.Flatten(), nn.Linear(64, 10))
    assert shortcuts(model, torch.randn(2, 1, 8, 8)) == [None] * 4


def test_a_failing_forward_pass_leaves_no_mode_behind() -> None:
    model = Block()
    with scaled(model, {0: 0.0}), pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 8, 8))
    assert torch.overrides._get_current_function_mode_stack() == []
