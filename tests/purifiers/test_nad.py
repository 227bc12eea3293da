"""NAD: which layers it finds, and its weights against a second implementation in float64."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixtures import SmallCNN
from unbackdoor import Dataset, UnbackdoorError, archs, purifiers, purify
from unbackdoor._data.texts import Tokens
from unbackdoor._models.stage_ends import stage_ends
from unbackdoor.purifiers.nad import attention, unit_length

BETA, EPOCHS, TEACHER, SIZE, RATE, SEED = 50.0, 2, 1, 16, 0.02, 5


def maps(model: SmallCNN, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The scores, and the attention of the last map at 8x8 and at 4x4, at length 1."""
    made = []
    for place, layer in enumerate(model.features):
        x = layer(x)
        if place in (2, 6):
            energy = (x**2).sum(dim=1).flatten(1)  # (batch, places)
            made.append(energy / (energy**2).sum(dim=1, keepdim=True).sqrt())
    return model.classifier(x.flatten(1)), made


def by_the_formula(model: SmallCNN, data: Dataset) -> None:
    generator, teacher = torch.Generator().manual_seed(SEED), copy.deepcopy(model)
    for mine, epochs, start in ((teacher, TEACHER, 0.01), (model, EPOCHS, RATE)):
        parameters = list(mine.parameters())
        velocity = [torch.zeros_like(one) for one in parameters]
        mine.train()
        for epoch in range(epochs):
            rate = start * (1 + math.cos(math.pi * epoch / epochs)) / 2
            for batch in data.batches(SIZE, generator=generator):
                scores, student = maps(mine, batch.inputs.double())
                loss = F.cross_entropy(scores, batch.labels)
                if mine is model:
                    with torch.no_grad():
                        _, wanted = maps(teacher.eval(), batch.inputs.double())
                    loss = loss + BETA * sum(F.mse_loss(one, other) for one, other in zip(student, wanted, strict=True))
                slopes = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    for one, slope, speed in zip(parameters, slopes, velocity, strict=True):
                        speed.mul_(0.9).add_(slope)
                        one.sub_(rate * speed)


def test_the_weights_are_those_of_the_formula(small_cnn: SmallCNN, digits: Dataset) -> None:
    model, data = small_cnn.double(), digits.select(range(50))
    method = purifiers.NAD(beta=BETA, teacher_epochs=TEACHER, epochs=EPOCHS, batch_size=SIZE, learning_rate=RATE)
    result = purify(model, data, method, seed=SEED, device="cpu").model.state_dict()
    by_the_formula(model, data)
    for name, expected in model.state_dict().items():
        # The product adds 1e-6 to the lengths, for maps that are zero everywhere.
        assert torch.allclose(result[name].double(), expected.double(), rtol=0, atol=1e-5), name


def built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = archs.build(name, classes=["a", "b"], channels=3, image_size=32, width=4)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["stages.1", "stages.2", "stages"]),  # 16x16, 8x8 and 4x4
        ("vit", ["vit.layers.1", "vit.layers.3", "vit.layers.5"]),
    ],
)
def test_the_layers_are_found_by_running(name: str, expected: list[str]) -> None:
    model = built(name)
    found = stage_ends(model, torch.zeros(2, 3, 32, 32), "NAD")
    assert [part.replace("encoder.layer.", "layers.") for part in found] == expected
    assert not any(module._forward_hooks for module in model.modules())


class Blocks(nn.Module):
    """Two blocks of Linear layers on tokens, and the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 6)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(2)])
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1, 2))  # (batch, tokens, 6)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(x.mean(dim=1))
        return scores


def test_blocks_are_the_outermost_members_of_a_list() -> None:
    assert stage_ends(Blocks(), torch.zeros(2, 1, 8, 8), "NAD") == ["blocks.0", "blocks.1"]


class ChannelsLast(nn.Module):
    """A convolution, and a layer that sees the channels in the last place, as ConvNeXt has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 5, 3, padding=1), nn.LayerNorm(5), nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).permute(0, 2, 3, 1))  # (batch, height, width, channels)
        scores: Tensor = self.head(x.mean(dim=(1, 2)))
        return scores


def test_a_map_with_its_channels_in_the_last_place_is_no_resolution() -> None:
    assert stage_ends(ChannelsLast(), torch.zeros(2, 1, 8, 8), "NAD") == ["conv"]


def test_attention_by_hand() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return (x, "more")

    model = nn.Sequential(Fixed())
    with attention(model, ["0"], power=3.0) as seen:
        model(torch.tensor([[[[1.0, -2.0]], [[0.0, 1.0]]]]))  # (1, 2 channels, 1, 2)
        assert seen["0"].tolist() == [[1.0, 9.0]]
        model(torch.tensor([[[1.0, 0.0, 1.0], [2.0, 0.0, 0.0]]]))  # (1, 2 tokens, 3)
        assert seen["0"].tolist() == [[2.0, 8.0]]
    assert not any(module._forward_hooks for module in model.modules())


def test_a_network_that_goes_on_in_place_has_the_map_of_before() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x).mul_(0)

    model = InPlace()
    nn.init.eye_(model.block.weight)
    with attention(model, ["block"], 2.0) as maps:
        model(torch.tensor([[[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]]))
    assert torch.equal(maps["block"].detach(), torch.tensor([[14.0, 1.0]]))
    maps["block"].sum().backward()
    assert torch.equal(model.block.weight.grad.diagonal(), torch.tensor([2.0, 2 * 2 * 2 + 2.0, 2 * 3 * 3.0]))


def test_padding_counts_for_nothing() -> None:
    inputs = Tokens(input_ids=torch.zeros(1, 3, dtype=torch.int64), attention_mask=torch.tensor([[1, 1, 0]]))
    made = unit_length(torch.tensor([[3.0, 4.0, 100.0]]), inputs)
    assert torch.allclose(made, torch.tensor([[0.6, 0.8, 0.0]]), atol=1e-5)


def test_a_model_without_places_is_refused(digits: Dataset) -> None:
    class Flat(nn.Sequential):
        pass

    with pytest.raises(UnbackdoorError) as caught:
        purify(Flat(nn.Flatten(), nn.Linear(64, 10)), digits.select(range(20)), purifiers.NAD(), device="cpu")
    assert str(caught.value) == (
        "NAD needs feature maps of convolutions, or transformer blocks; Flat has none. Try fst."
    )
