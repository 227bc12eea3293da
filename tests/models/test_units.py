"""The units that can be pruned: found by kind, order and running; folded away; taken back if accuracy suffers."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixtures import SmallCNN
from unbackdoor import Dataset, UnbackdoorError, archs, purifiers
from unbackdoor._data.texts import Tokens
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.calling import probe
from unbackdoor._models.units import channels, feed_forward, mean_activation, norms, sizes_of
from unbackdoor.purifiers._masks import scaled_
from unbackdoor.purifiers._pruning import as_far_as_accurate_, silence_


def test_channels_come_in_module_order(small_cnn: SmallCNN) -> None:
    features = small_cnn.features
    found = channels(small_cnn, purifiers.CLP())
    assert [(unit.convolution, unit.norm) for unit in found] == [
        (features[0], features[1]),
        (features[4], features[5]),
    ]
    assert list(norms(small_cnn, purifiers.ANP())) == ["features.1", "features.5"]


def test_padding_does_not_count_whether_tokens_lie_in_rows_or_behind_each_other() -> None:
    values = torch.arange(-6.0, 6).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    inputs = Tokens({"input_ids": torch.zeros(2, 3, dtype=torch.int64), "attention_mask": mask})
    wanted = [[6, 5], [4, 3], [0, 1]]
    assert sizes_of(values, inputs).tolist() == wanted
    assert sizes_of(values.view(6, 2), inputs).tolist() == wanted
    assert sizes_of(values[:, 0], inputs).tolist() == [[6, 5], [0, 1]]  # one row for each text


class PreActivation(nn.Module):
    """Two blocks that normalise before they convolve; layers are registered in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(5))
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(4))
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in range(2):
            first, second = self.norms[2 * block : 2 * block + 2]
            inner = self.convolutions[2 * block](first(x).relu())
            x = x + self.convolutions[2 * block + 1](second(inner).relu())
        return self.head(self.norms[4](x).relu().mean(dim=(2, 3)))


def pairs(model: nn.Module, inputs: Tensor | None = None) -> list[tuple[str, str]]:
    """Each BatchNorm that CLP may prune, and the convolution that it reads, by their names."""
    names = {layer: name for name, layer in model.named_modules()}
    return [(unit.name, names[unit.convolution]) for unit in channels(model, purifiers.CLP(), inputs)]


def test_a_norm_is_paired_with_what_it_reads_whatever_the_order_of_registration() -> None:
    """By hand: the first norm reads the stem, each block's second reads its first convolution, the others sums."""
    expected = [("norms.0", "stem"), ("norms.1", "convolutions.0"), ("norms.3", "convolutions.2")]
    assert pairs(PreActivation()) == expected
    assert pairs(PreActivation().requires_grad_(False), torch.zeros(2, 1, 9, 9)) == expected


def test_the_pairs_of_this_projects_networks() -> None:
    after = archs.build("resnet18", classes=["a", "b"], channels=3, image_size=16, width=2)
    found = pairs(after)
    assert len(found) == 20
    assert all(name.replace("bn", "conv") == convolution for name, convolution in found if "bn" in name)
    assert next(each for each in found if "shortcut" in each[0]) == ("stages.1.0.shortcut.1", "stages.1.0.shortcut.0")
    before = archs.build("preact-resnet18", classes=["a", "b"], channels=3, image_size=16, width=2)
    blocks = [f"stages.{stage}.{block}" for stage in range(4) for block in range(2)]
    assert pairs(before) == [
        ("stages.0.0.bn1", "conv1"),
        *((f"{block}.bn2", f"{block}.conv1") for block in blocks),
    ]


class Between(nn.Module):
    """Something between a convolution and its BatchNorm."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.first, self.other = nn.BatchNorm2d(4), nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)
        self.two, self.again = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(4)
        self.head, self.between = nn.Linear(4, 2), between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.between(self, x)).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (lambda m, x: m.first(x), "first"),
        (lambda m, x: nn.Identity()(m.first(x)), "first"),
        (lambda m, x: F.relu_(m.first(x)), "first"),
        (lambda m, x: F.leaky_relu(F.dropout(m.first(x), training=m.training)), "first"),
        (lambda m, x: F.max_pool2d(F.gelu(m.first(x)), 2), "first"),
        (lambda m, x: (m.other(x), m.first(x))[1], "first"),
        (lambda m, x: (m.again(m.first(x)), m.first(x))[1], "first"),
        (lambda m, x: m.first(x) + m.other(x), None),
        (lambda m, x: m.first(x) * m.other(x).sigmoid(), None),
        (lambda m, x: torch.cat([m.two(x), m.two(x)], dim=1), None),
        (lambda m, x: m.first(x).flip(1), None),
        (lambda m, x: x.expand(-1, 4, -1, -1), None),
        (lambda m, x: (m.norm(m.other(x)), m.first(x))[1], None),
    ],
)
def test_what_may_stand_between_a_convolution_and_its_norm(
    between: Callable[[nn.Module, Tensor], Tensor], expected: str | None
) -> None:
    model = Between(between)
    if expected is None:
        with pytest.raises(UnbackdoorError, match=r"^CLP needs convolutions followed by BatchNorm"):
            pairs(model)
    else:
        assert ("norm", expected) in pairs(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_without_examples_a_network_for_pictures_of_an_odd_size_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 9 * 31, 2))
    with pytest.raises(UnbackdoorError) as refused:
        channels(model, purifiers.CLP())
    assert str(refused.value) == (
        "CLP pairs layers by running the model, and Sequential takes no image of a usual size. Give clean examples."
    )
    assert pairs(model, torch.zeros(1, 5, 11, 33)) == [("1", "0")]


def test_a_model_without_batchnorm_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(
        UnbackdoorError,
        match=r"^ANP needs BatchNorm layers with weights and statistics; Sequential has none\. Try fine-pruning\.$",
    ):
        norms(model, purifiers.ANP())


def test_feed_forward_blocks_are_found_by_running(digits: Dataset, small_cnn: SmallCNN, small_vit: nn.Module) -> None:
    found = feed_forward(small_vit, probe(small_vit, digits))
    assert len(found) == 6
    assert {str(layer) for layer in found} == {"Linear(in_features=24, out_features=12, bias=True)"}
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

    kept = as_far_as_accurate_([weight], [partial(drop, place) for place in range(4)], lambda: bool(weight.sum() >= 2))
    assert kept == 2
    assert weight.tolist() == [0, 0, 1, 1]
