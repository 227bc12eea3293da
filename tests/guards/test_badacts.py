"""BadActs: Gaussian activations, networks of any kind, bounds."""

import math

import pytest
import torch
from torch import Tensor, nn

import toys
from unbackdoor import Dataset, ImageEncoder, UnbackdoorError, archs, fit_guard, guards
from unbackdoor._models.blocks import answer_token, blocks, vectors


class Plain(nn.Module):
    """A network without any list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x.flatten(1)))


def gaussian_pictures(count: int, seed: int) -> Dataset:
    """Pictures of 16x16 independent Gaussian pixels."""
    drawn = torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    return Dataset(
        items=(128 + 20 * drawn).clamp(0, 255).round().to(torch.uint8),
        labels=torch.arange(count) % 2,
        encode=ImageEncoder(mean=(0.5,), std=(0.1,), channels=1),
    )


@pytest.mark.parametrize("width", [1.0, 2.0, 3.0])
def test_the_share_of_gaussian_activations_is_that_of_the_error_function(width: float) -> None:
    model = nn.Sequential(nn.PixelUnshuffle(16), nn.Flatten(), nn.Linear(256, 2)).eval()
    guard, run = guards.BadActs(width=width), toys.a_run(model=model, head_name="2")
    learnt = guard(model, gaussian_pictures(1500, 0), run)
    found = guard.scores(model, gaussian_pictures(500, 1), learnt, run)
    # Pixels are whole numbers, which moves a bound by half of a grey level at most.
    tolerance = math.erf((width + 0.03) / math.sqrt(2)) - math.erf((width - 0.03) / math.sqrt(2))
    assert float(found.scores.mean()) == pytest.approx(math.erf(width / math.sqrt(2)), abs=tolerance)


def test_blocks_are_found_in_any_network(digits: Dataset, text_victim: nn.Module, reviews: Dataset) -> None:
    pictures = digits.inputs(slice(4))
    resnet = archs.build("resnet18", classes=list("0123456789"), channels=1, image_size=8, width=2)
    assert len(blocks(resnet, pictures, "head", "x")) == 8
    assert blocks(Plain(), pictures, "head", "x") == ["first"]
    with pytest.raises(UnbackdoorError) as refusal:
        blocks(nn.Sequential(nn.Linear(64, 2)), pictures.flatten(1), "0", "BadActs")
    assert str(refusal.value) == "BadActs needs a layer before the head; Sequential has none. Try strip."
    texts = reviews.inputs(slice(4))
    assert blocks(text_victim, texts, "classifier", "x") == ["bert.encoder.layer.0", "bert.encoder.layer.1"]


@pytest.mark.parametrize(
    ("kind", "block", "place"),
    [("bert", "bert.encoder.layer.1", "first"), ("gpt2", "transformer.h.1", "last"), ("bart", None, "last")],
)
def test_the_token_that_a_model_answers_from_is_found(kind: str, block: str | None, place: str, reviews) -> None:
    model, texts = toys.classifier(kind), reviews.inputs(slice(6))
    last = block or blocks(model, texts, "classification_head.out_proj", "x")[-1]
    assert answer_token(model, texts, last) == place


def test_the_vector_of_an_input_leaves_padding_out(reviews: Dataset) -> None:
    inputs = reviews.inputs(torch.tensor([0, 1]))
    inputs["attention_mask"] = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    inputs["input_ids"] = torch.zeros(2, 4, dtype=torch.int64)
    features = torch.arange(8.0).view(2, 4, 1)
    found = {place: vectors(features, inputs, place).flatten().tolist() for place in ("first", "last", "all")}
    assert found == {"first": [0.0, 5.0], "last": [2.0, 7.0], "all": [1.0, 6.0]}
    pictures = torch.zeros(1, 3, 4, 4)
    first, last = torch.arange(8.0).view(1, 2, 2, 2), torch.arange(12.0).view(1, 2, 2, 3)
    assert vectors(first, pictures, "all").tolist() == [[1.5, 5.5]]  # channels before positions
    assert vectors(last, pictures, "all").tolist() == [[4.5, 5.5, 6.5]]  # and after them


def test_a_backdoor_is_seen(backdoored: tuple, digits: Dataset) -> None:
    pixels = digits.pixels[1400:1500].clone()
    pixels[:, :, :2, :2] = 255
    fitted = fit_guard(
        backdoored[0], digits.select(range(1000, 1200)), guards.BadActs(), false_alarms=0.1, device="cpu"
    )
    answers = fitted.wrap(backdoored[0])(pixels)
    assert sum(answer.decision.action == "reject" for answer in answers) > 50


def test_without_bounds_the_answers_are_the_same_bit_for_bit(backdoored: tuple, digits: Dataset) -> None:
    model, inputs = backdoored[0], digits.inputs(slice(20))
    shapes = {"features.2": (16, 1, 1), "features.6": (32, 1, 1)}
    learnt = {f"low.{name}": torch.full(shape, -torch.inf) for name, shape in shapes.items()}
    learnt |= {f"high.{name}": torch.full(shape, torch.inf) for name, shape in shapes.items()}
    with torch.no_grad():
        before = model(inputs)
        with guards.BadActs(purify=True).restrained(model, learnt, 0.0, None):
            assert torch.equal(model(inputs), before)
        learnt["high.features.6"] = torch.zeros(32, 1, 1)
        with guards.BadActs(purify=True).restrained(model, learnt, 0.0, None):
            assert torch.allclose(model(inputs), model.classifier.bias.expand(20, -1))
        assert torch.equal(model(inputs), before)


def test_bounds_keep_the_answers_to_clean_inputs(backdoored: tuple, digits: Dataset) -> None:
    model, clean, fresh = backdoored[0], digits.select(range(1000, 1200)), digits.select(range(1200, 1400))
    guard = guards.BadActs(purify=True, epochs=10, learning_rate=0.05)
    fitted = fit_guard(model, clean, guard, false_alarms=0.1, device="cpu")
    widths = fitted.learnt["high.features.6"] - fitted.learnt["low.features.6"]
    assert widths.shape == (32, 1, 1)
    assert float(widths.min()) > 0
    with torch.no_grad(), guard.restrained(model, fitted.learnt, 0.0, None):
        right = (model(fresh.inputs(slice(200))).argmax(1) == fresh.labels).float().mean()
    with torch.no_grad():
        before = (model(fresh.inputs(slice(200))).argmax(1) == fresh.labels).float().mean()
    assert right > before - 0.05
    answers = fitted.wrap(model)(fresh)
    changed = [answer for answer in answers if answer.decision.action == "clean"]
    assert 0 < len(changed) < 60
    assert all(answer.decision.output == str(int(answer.answer.argmax())) for answer in changed)
    assert not any(answer.decision.action == "reject" for answer in answers)


def test_bounds_that_no_try_finds_are_those_of_clean_inputs(
    backdoored: tuple, digits: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, clean = backdoored[0], digits.select(range(1000, 1100))
    run = toys.a_run(model=model)
    monkeypatch.setattr("unbackdoor.guards._activation_bounds.TRIES", 0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    learnt = guards.BadActs(purify=True).__call__(model, clean, run)
    seen = model.features[:3](clean.inputs(slice(100))).amax(dim=(0, 2, 3))
    assert torch.allclose(learnt["high.features.2"].flatten(), seen, atol=1e-5)
    assert run.warnings == ["BadActs found no bounds that keep the accuracy; it takes the extremes of clean inputs."]
