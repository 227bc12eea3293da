"""FT-SAM against a second implementation in float64 that works from the formula alone."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fixtures import SmallCNN
from unbackdoor import Dataset, purifiers, purify

EPOCHS, BATCH, RATE, SMOOTHING, SEED = 2, 16, 0.02, 0.1, 5


def smoothed(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-(1 - s) log p_y - s mean over classes of log p."""
    log = scores - scores.exp().sum(dim=1, keepdim=True).log()
    return -((1 - SMOOTHING) * log[range(len(labels)), labels] + SMOOTHING * log.mean(dim=1)).mean()


def by_the_formula(model: SmallCNN, data: Dataset, *, rho: float, adaptive: bool) -> None:
    generator, parameters = torch.Generator().manual_seed(SEED), list(model.parameters())
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    velocity = [torch.zeros_like(one) for one in parameters]
    model.train()
    for epoch in range(EPOCHS):
        rate = RATE * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
        for batch in data.batches(BATCH, generator=generator):
            inputs = batch.inputs.double()
            first = torch.autograd.grad(smoothed(model(inputs), batch.labels), parameters)
            statistics = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in norms]
            scale = [one.detach().abs() if adaptive else torch.ones_like(one) for one in parameters]
            total = math.sqrt(sum(((size * slope) ** 2).sum().item() for size, slope in zip(scale, first, strict=True)))
            start = [one.detach().clone() for one in parameters]
            with torch.no_grad():
                for one, slope, size in zip(parameters, first, scale, strict=True):
                    one.add_(rho * size**2 * slope / total)
            second = torch.autograd.grad(smoothed(model(inputs), batch.labels), parameters)
            with torch.no_grad():
                for layer, (mean, var) in zip(norms, statistics, strict=True):
                    layer.running_mean.copy_(mean)
                    layer.running_var.copy_(var)
                for one, old, slope, speed in zip(parameters, start, second, velocity, strict=True):
                    speed.mul_(0.9).add_(slope)
                    one.copy_(old - rate * speed)


@pytest.mark.parametrize(("rho", "adaptive"), [(2.0, True), (0.05, False), (0.0, True)])
def test_the_weights_are_those_of_the_formula(rho: float, adaptive: bool, small_cnn: SmallCNN, digits: Dataset) -> None:
    model, data = small_cnn.double(), digits.select(range(50))
    method = purifiers.FTSAM(
        rho=rho, adaptive=adaptive, label_smoothing=SMOOTHING, epochs=EPOCHS, batch_size=BATCH, learning_rate=RATE
    )
    result = purify(model, data, method, seed=SEED, device="cpu").model.state_dict()
    by_the_formula(model, data, rho=rho, adaptive=adaptive)
    for name, expected in model.state_dict().items():
        if "num_batches" not in name:
            assert torch.allclose(result[name], expected, rtol=0, atol=1e-9), name


def test_without_perturbation_and_smoothing_it_is_fine_tuning(small_cnn: SmallCNN, digits: Dataset) -> None:
    settings = {"epochs": 1, "batch_size": BATCH, "learning_rate": RATE}
    data = digits.select(range(50))
    same = [
        purify(small_cnn, data, method, seed=SEED, device="cpu", precision="fp32").model.state_dict()
        for method in (purifiers.FTSAM(rho=0, label_smoothing=0, **settings), purifiers.FineTuning(**settings))
    ]
    for name in same[0]:
        assert torch.allclose(same[0][name], same[1][name], atol=1e-6), name


def test_the_perturbed_loss_is_higher(small_cnn: SmallCNN, digits: Dataset) -> None:
    batch = next(iter(digits.select(range(60)).batches(60)))
    parameters = list(small_cnn.parameters())
    before = F.cross_entropy(small_cnn(batch.inputs), batch.labels)
    before.backward()
    purifiers.FTSAM(rho=1.0).perturb_(parameters)
    assert F.cross_entropy(small_cnn(batch.inputs), batch.labels) > before
    assert all(parameter.grad is None for parameter in parameters)
