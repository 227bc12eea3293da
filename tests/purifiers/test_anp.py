"""ANP: one step of the mask against a second implementation that writes the perturbed BatchNorm out by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixtures import SmallCNN
from toys import a_run
from unbackdoor import Dataset, UnbackdoorError, purifiers, purify


def answers(model: SmallCNN, x: Tensor, scales: list[Tensor]) -> Tensor:
    """The network with batch statistics, where `scales` multiply weight, weight, bias and bias of its two norms."""
    f = model.features
    for place, (conv, norm) in enumerate(((f[0], f[1]), (f[4], f[5]))):
        x = conv(x)
        mean, variance = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=0)
        x = (x - mean[:, None, None]) / (variance[:, None, None] + norm.eps).sqrt()
        weight, bias = norm.weight * scales[place], norm.bias * scales[place + 2]
        x = F.relu(x * weight[:, None, None] + bias[:, None, None])
        x = F.max_pool2d(x, 2) if place == 0 else x
    return model.classifier(x.flatten(1))


def test_one_step_is_that_of_the_formula(small_cnn: SmallCNN, digits: Dataset) -> None:
    model, data = small_cnn.double(), digits.select(range(24))
    with torch.no_grad():
        for place in (1, 5):
            model.features[place].bias.uniform_(-0.5, 0.5)
    epsilon, alpha, rate = 0.3, 0.25, 0.4
    method = purifiers.ANP(steps=1, batch_size=24, epsilon=epsilon, alpha=alpha, learning_rate=rate)
    found = method.masks(model, data, a_run(seed=3, model=model))

    generator = torch.Generator().manual_seed(3)
    rows = torch.randperm(24, generator=generator)
    x, y = data.encode(data.items[rows]).double(), data.labels[rows]
    masks = [torch.ones(16).double().requires_grad_(True), torch.ones(32).double().requires_grad_(True)]
    noises = [
        ((2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1) * epsilon).requires_grad_(True)
        for size in (16, 32, 16, 32)
    ]

    def loss(noise: list[Tensor]) -> Tensor:
        scales = [masks[0] + noise[0], masks[1] + noise[1], 1 + noise[2], 1 + noise[3]]
        return F.cross_entropy(answers(model, x, scales), y)

    slopes = torch.autograd.grad(loss(noises), noises)
    worst = [
        (noise + epsilon * slope.sign()).clamp(-epsilon, epsilon).detach()
        for noise, slope in zip(noises, slopes, strict=True)
    ]
    still = [torch.zeros_like(noise) for noise in worst]
    gradients = torch.autograd.grad(alpha * loss(still) + (1 - alpha) * loss(worst), masks)
    for mask, gradient, expected in zip(found, gradients, masks, strict=True):
        assert torch.allclose(mask, (expected - rate * gradient).clamp(0, 1).detach(), atol=1e-6)
    assert any((mask < 1).any() for mask in found)


def test_the_copy_alone_is_touched_while_masks_are_learned(small_cnn: SmallCNN, digits: Dataset) -> None:
    before = {name: tensor.clone() for name, tensor in small_cnn.state_dict().items()}
    result = purify(small_cnn, digits.select(range(60)), purifiers.ANP(steps=6, batch_size=16, tolerance=1.0), seed=0)
    after = result.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= {"features.1.weight", "features.5.weight"}
    for name in changed:
        assert ((after[name] == before[name]) | (after[name] == 0)).all()
    assert result.record["clean"]["held_out"] == 12
    assert result.record["examples_seen"] == 6 * 16


def test_a_model_without_batchnorm_is_refused(digits: Dataset, small_vit: nn.Module) -> None:
    message = r"^ANP needs BatchNorm layers with .*; ViTForImageClassification has none\. Try fine-pruning\.$"
    with pytest.raises(UnbackdoorError, match=message):
        purify(small_vit, digits.select(range(60)), purifiers.ANP())


def test_when_nothing_may_go_a_warning_says_so(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only channel is needed, so the first threshold already costs too much."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))
    model = purify(plain, digits, purifiers.FineTuning(epochs=5, learning_rate=0.05), seed=0).model
    monkeypatch.setattr(purifiers.ANP, "masks", lambda *_: [torch.zeros(1)])
    record = purify(model, digits.select(range(200)), purifiers.ANP(tolerance=0.0), seed=0).record
    assert record["warnings"] == [
        "ANP pruned nothing of 1 channels: clean accuracy on 40 held-out examples allows pruning none. "
        "Raise its `tolerance`."
    ]


def test_masks_that_never_fell_are_not_blamed_on_accuracy(small_cnn: SmallCNN, digits: Dataset) -> None:
    record = purify(small_cnn, digits.select(range(60)), purifiers.ANP(steps=1, learning_rate=1e-6, tolerance=1)).record
    expected = (
        "ANP pruned nothing of 48 channels: no mask fell to 0.95 or below. Learn it for longer, or at a higher rate."
    )
    assert expected in record["warnings"]


@pytest.mark.parametrize("method", [purifiers.ANP(steps=3, epsilon=1e38), purifiers.RNP(epochs=2, forget_rate=1e30)])
def test_a_mask_that_is_no_number_is_refused(
    method: purifiers.ANP | purifiers.RNP, small_cnn: SmallCNN, digits: Dataset
) -> None:
    message = rf"^{type(method).__name__} learned a mask with non-finite values\. Lower its rates\.$"
    with pytest.raises(UnbackdoorError, match=message):
        purify(small_cnn, digits.select(range(60)), method)


@pytest.mark.parametrize("kind", [{"affine": False}, {"track_running_stats": False}])
def test_batchnorm_without_weights_or_statistics_does_not_do(kind: dict[str, bool], digits: Dataset) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, **kind), nn.Flatten(), nn.Linear(288, 10))
    with pytest.raises(
        UnbackdoorError, match=r"^ANP needs BatchNorm layers with weights and statistics; Sequential has"
    ):
        purify(model, digits.select(range(60)), purifiers.ANP())


@pytest.mark.parametrize("method", [purifiers.ANP, purifiers.RNP])
def test_a_threshold_given_prunes_what_lies_below_it(
    method: type[purifiers.ANP | purifiers.RNP],
    small_cnn: SmallCNN,
    digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The masks are given here, so it is known which channels go; all clean examples are there to learn them."""
    masks = [torch.linspace(0, 1, 16), torch.linspace(0, 1, 32)]  # 8 and 16 of them at most a half
    seen: list[int] = []

    def given(_self: Any, _model: nn.Module, clean: Dataset, _run: Any) -> list[torch.Tensor]:
        seen.append(len(clean))
        return masks

    monkeypatch.setattr(method, "masks", given)
    result = purify(small_cnn, digits.select(range(60)), method(threshold=0.5), seed=0)
    name = method.__name__
    assert seen == [60]
    assert result.record["clean"]["held_out"] == 0
    assert result.record["notes"] == [f"{name} pruned 24 of 48 channels, those with a mask of at most 0.5."]
    for layer, mask in zip(("features.1", "features.5"), masks, strict=True):
        weight = result.model.state_dict()[f"{layer}.weight"]
        assert torch.equal(weight == 0, mask <= 0.5)
    masks[:] = [torch.ones(16), torch.ones(32)]
    result = purify(small_cnn, digits.select(range(60)), method(threshold=0.5), seed=0)
    expected = f"{name} pruned nothing of 48 channels: none has so low a mask. Raise its `threshold`."
    assert expected in result.record["warnings"]  # next to that of an untrained model
