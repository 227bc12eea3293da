"""Feature Shift Tuning and its family against a second implementation that works from the formulas alone."""

import math

import pytest
import torch
from torch.nn import functional as F

from fixtures import SmallCNN
from unbackdoor import Dataset, purifiers, purify

EPOCHS, BATCH, RATE, ALPHA, SEED = 3, 16, 0.02, 0.3, 5


def by_the_formula(model: SmallCNN, data: Dataset, *, init: bool, tuned: str, alpha: float, project: bool) -> None:
    """SGD with momentum written out by hand: v <- 0.9 v + g, w <- w - rate v, rate_e = rate (1 + cos(pi e / E)) / 2.

    It shares with the product only the sequence of batches and the random numbers of the new head, both of which come
    from a generator with the seed, head first.
    """
    generator = torch.Generator().manual_seed(SEED)
    head = model.classifier
    suspect = head.weight.detach().clone()
    if init:
        s = 1 / math.sqrt(head.in_features)
        for tensor in (head.weight, head.bias):
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data = drawn * 2 * s - s
    chosen = {"all": list(model.parameters()), "head": list(head.parameters())}
    chosen["extractor"] = [one for one in model.parameters() if all(one is not other for other in head.parameters())]
    velocity = [torch.zeros_like(one) for one in chosen[tuned]]
    model.train()
    for epoch in range(EPOCHS):
        rate = RATE * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
        order = torch.randperm(len(data), generator=generator)
        for rows in order.split(BATCH):
            x = (data.items[rows].double() / 255 - 0.25) / 0.5
            loss = F.cross_entropy(model(x), data.labels[rows]) + alpha * torch.sum(head.weight * suspect)
            gradients = torch.autograd.grad(loss, chosen[tuned])
            with torch.no_grad():
                for one, gradient, speed in zip(chosen[tuned], gradients, velocity, strict=True):
                    speed.mul_(0.9).add_(gradient)
                    one.sub_(rate * speed)
                if project:
                    head.weight.mul_(math.sqrt((suspect**2).sum()) / math.sqrt((head.weight**2).sum()))


@pytest.mark.parametrize(
    ("method", "recipe"),
    [
        (purifiers.FST(alpha=ALPHA), {"init": True, "tuned": "all", "alpha": ALPHA, "project": True}),
        (purifiers.FST(alpha=ALPHA, project=False), {"init": True, "tuned": "all", "alpha": ALPHA, "project": False}),
        (purifiers.FTInit(), {"init": True, "tuned": "all", "alpha": 0, "project": False}),
        (purifiers.FineTuning(), {"init": False, "tuned": "all", "alpha": 0, "project": False}),
        (purifiers.FETuning(), {"init": True, "tuned": "extractor", "alpha": 0, "project": False}),
        (purifiers.LinearProbing(), {"init": False, "tuned": "head", "alpha": 0, "project": False}),
    ],
    ids=lambda part: type(part).__name__ if not isinstance(part, dict) else "",
)
def test_the_weights_are_those_of_the_formula(method, recipe, small_cnn: SmallCNN, digits: Dataset) -> None:
    from dataclasses import replace

    # The numbers of the formula: exactly representable mean and deviation, so that both encode alike in float64.
    encode = replace(digits.encode, mean=(0.25,), std=(0.5,))
    data = replace(digits.select(range(50)), encode=encode)
    method = replace(method, epochs=EPOCHS, batch_size=BATCH, learning_rate=RATE)
    model = small_cnn.double()
    result = purify(model, data, method, seed=SEED).model
    by_the_formula(model, data, **recipe)
    for name, expected in model.state_dict().items():
        actual = result.state_dict()[name]
        assert torch.allclose(actual.double(), expected.double(), rtol=0, atol=1e-6), name


def test_the_head_keeps_its_norm_and_turns_away(small_cnn: SmallCNN, digits: Dataset) -> None:
    data = digits.select(range(100))
    suspect = small_cnn.classifier.weight.detach()
    weak, strong = (
        purify(small_cnn, data, purifiers.FST(alpha=alpha, epochs=5), seed=0).model.classifier.weight.detach()
        for alpha in (0.0, 1.0)
    )
    assert torch.allclose(strong.norm(), suspect.norm(), rtol=1e-5)
    assert (strong * suspect).sum() < (weak * suspect).sum()


def test_a_new_head_is_uniform_within_its_bound() -> None:
    from torch import nn

    from unbackdoor._models.head import reinitialise_

    layer = nn.Linear(100, 50)
    reinitialise_(layer, torch.Generator().manual_seed(0))
    for drawn in (layer.weight, layer.bias):
        assert drawn.abs().max() <= 0.1
    assert layer.weight.mean().abs() < 0.005  # standard error 0.1 / sqrt(3 * 5000) = 0.0008
    assert abs(layer.weight.std().item() - 0.1 / math.sqrt(3)) < 0.002
    assert layer.bias.std() > 0.03


def test_linear_probing_moves_the_head_and_the_running_statistics_alone(small_cnn: SmallCNN, digits: Dataset) -> None:
    before = {name: tensor.clone() for name, tensor in small_cnn.state_dict().items()}
    after = purify(small_cnn, digits.select(range(50)), purifiers.LinearProbing(epochs=1), seed=0).model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"classifier.weight", "classifier.bias"} <= moved
    assert all("running" in name or "num_batches" in name for name in moved - {"classifier.weight", "classifier.bias"})


def test_fe_tuning_freezes_the_new_head(small_cnn: SmallCNN, digits: Dataset) -> None:
    one, two = (
        purify(small_cnn, digits.select(range(50)), purifiers.FETuning(epochs=epochs), seed=0).model
        for epochs in (1, 2)
    )
    assert torch.equal(one.classifier.weight, two.classifier.weight)
    assert not torch.equal(one.classifier.weight, small_cnn.classifier.weight)
    assert all(parameter.requires_grad for parameter in one.parameters())  # as the suspect's
