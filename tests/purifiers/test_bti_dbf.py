"""BTI-DBF: its two losses against the formulas, and what its parts must do."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fixtures import SmallCNN
from toys import a_run
from unbackdoor import Dataset, purifiers, purify
from unbackdoor._inversion.benign_features import CleanFeatures, benign_mask, clean_features
from unbackdoor._inversion.generator import GeneratorSearch, TriggerGenerator


def test_the_generators_loss_by_hand() -> None:
    search = GeneratorSearch(distance=0.1, drift=1.0)
    mask = torch.tensor([1.0, 0.5])
    movement = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    near, far = torch.full((2, 1, 2, 2), 0.1), torch.full((2, 1, 2, 2), 0.4)
    # Benign: (1 + 1 + 0 + 4) / 4 = 1.5, more than the drift: back to the picture, 0.1^2.
    assert search.loss(near, movement, mask).item() == pytest.approx(0.01)
    # Half of the movement: benign 1.5 / 4; the rest (0 + 0.25 + 0 + 1) / 4.
    assert search.loss(near, movement / 2, mask).item() == pytest.approx(0.01 * 0.375 - 0.3125)
    assert search.loss(far, movement / 2, mask).item() == pytest.approx(0.16)


def test_the_mask_is_that_of_the_formula() -> None:
    drawn = torch.Generator().manual_seed(1)
    features = torch.rand(40, 6, generator=drawn, dtype=torch.float64)
    labels = torch.arange(40) % 3
    features[:, :3] += 2 * F.one_hot(labels, 3)
    head = nn.Linear(6, 3).double().requires_grad_(False)
    head.weight.copy_(2 * torch.eye(3, 6))
    scale = features.std()
    mask = benign_mask(head, CleanFeatures(features / scale, scale), labels, a_run(seed=2), steps=5)

    p = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    first, second = torch.zeros(6), torch.zeros(6)
    for step in range(1, 6):  # all 40 examples are in each batch of at most 128
        m = (torch.tanh(p) + 1) / 2
        loss = -torch.log_softmax(head(m * features), 1)[range(40), labels].mean()
        loss = loss + torch.log_softmax(head((1 - m) * features), 1)[range(40), labels].mean() + 3 * m.sum() / 6
        (g,) = torch.autograd.grad(loss, p)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        step_size = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        p = (p - 0.01 * step_size).detach().requires_grad_(True)
    assert torch.allclose(mask, (torch.tanh(p) + 1) / 2, rtol=0, atol=1e-9)
    useless = benign_mask(head, CleanFeatures(features / scale, scale), labels, a_run(), steps=200)[3:]
    assert (useless < 0.1).all()  # the head does not look at these


def test_features_are_in_the_order_of_the_rows(small_cnn: SmallCNN, digits: Dataset) -> None:
    data = digits.select(range(30))
    clean = clean_features(small_cnn.double(), data, a_run())
    expected = small_cnn.features(data.encode(data.items).double()).flatten(1).detach()
    assert torch.allclose(clean.scaled * clean.scale, expected)


def test_unlearning_keeps_features_by_the_formula(small_cnn: SmallCNN, digits: Dataset) -> None:
    """One step of Adam at 1e-3 on CE(f(x'), y) + mean |f(x) - f(x')|^2, both passes in train mode."""
    data = digits.select(range(20))
    model = small_cnn.double()
    reference = SmallCNN().double()
    reference.load_state_dict(model.state_dict())
    method = purifiers.BTIDBF(epochs=1, batch_size=20, share=0.1, learning_rate=1e-3)
    method.unlearn_(model, data, a_run(seed=4), lambda pixels: 1 - pixels)

    rows = torch.randperm(20, generator=torch.Generator().manual_seed(4))
    x = data.items[rows].double() / 255
    triggered = x.clone()
    for place in (0, 6, 13):  # int(0.1 * 20 + 1) = 3 of 20, evenly spread
        triggered[place] = 1 - x[place]
    reference.train()
    touched, plain = (reference.features((part - 0.3) / 0.37).flatten(1) for part in (triggered, x))
    scores = reference.classifier(touched)
    loss = F.cross_entropy(scores, data.labels[rows]) + (touched - plain).square().mean()
    for weight, g in zip(reference.parameters(), torch.autograd.grad(loss, [*reference.parameters()]), strict=True):
        weight.data -= 1e-3 * g / (g.abs() + 1e-8)
    for (name, weight), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        if not name.startswith("features") or "bias" not in name:  # a bias before BatchNorm has no gradient but noise
            assert torch.allclose(weight, expected, rtol=0, atol=1e-5), name


def test_the_generator_is_trained_further_from_round_to_round(small_cnn: SmallCNN, digits: Dataset) -> None:
    data, search = digits.select(range(40)), GeneratorSearch(epochs=1)
    run = a_run()
    first = search(small_cnn.double(), data, run)
    assert isinstance(first, TriggerGenerator)
    assert first.target in range(10)
    assert run.notes[0].startswith(f"BTI-DBF: the inverted trigger leads to {first.target} (")
    assert search(small_cnn, data, run, first) is first


def test_the_search_alone_has_the_defaults_of_the_method() -> None:
    method, search = purifiers.BTIDBF(), GeneratorSearch()
    assert search == GeneratorSearch(
        epochs=method.generator_epochs, distance=method.distance, drift=method.drift, batch_size=method.batch_size
    )


def test_it_changes_the_model_and_leaves_no_hooks(small_cnn: SmallCNN, digits: Dataset) -> None:
    method = purifiers.BTIDBF(rounds=2, generator_epochs=1, epochs=1, batch_size=20)
    result = purify(small_cnn, digits.select(range(40)), method, seed=0)
    assert result.record["examples_seen"] == 2 * (40 + 40)
    assert len(result.record["notes"]) == 2
    assert not result.model.classifier._forward_pre_hooks
