"""Neural Cleanse: the median by hand, the loss by the formula, and a planted trigger that must be found."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from fixtures import SmallCNN
from toys import a_run
from unbackdoor import Dataset, ImageEncoder, purifiers, purify
from unbackdoor._inversion.masks import MaskSearch, anomaly_index
from unbackdoor._models.arithmetic import Arithmetic


def test_the_anomaly_index_by_hand() -> None:
    # Median (9 + 10) / 2 = 9.5; deviations 7.5, 1.5, 0.5, 0.5, 1.5, 2.5 have the median 1.5.
    index = anomaly_index(torch.tensor([2.0, 8.0, 9.0, 10.0, 11.0, 12.0], dtype=torch.float64))
    expected = [7.5 / (1.4826 * 1.5), 1.5 / (1.4826 * 1.5), 0.5 / (1.4826 * 1.5), 0.0, 0.0, 0.0]
    assert index.tolist() == pytest.approx(expected)


def test_two_classes_have_no_outlier_and_equal_ones_make_a_smaller_one_infinitely_odd() -> None:
    assert anomaly_index(torch.tensor([1.0, 100.0])).max() < 2
    assert anomaly_index(torch.tensor([5.0, 5.0, 5.0, 1.0])).tolist() == [0, 0, 0, math.inf]
    assert anomaly_index(torch.tensor([5.0, 5.0, 5.0])).tolist() == [0, 0, 0]


def by_the_formula(
    model: SmallCNN, pixels: torch.Tensor, *, steps: int, cost: float, success: float, patience: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class by class, image by image, Adam written out; every batch is all of the pixels, in a drawn order."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand((10, 2, 8, 8), generator=generator, dtype=torch.float64) * 0.98 + 0.01
    free, masks, patterns = torch.atanh(2 * uniform - 1), [], []
    for target in range(10):
        z, lam, runs = free[target].clone().requires_grad_(True), cost, [0, 0]
        first, second = torch.zeros_like(z), torch.zeros_like(z)
        best, smallest = None, math.inf
        for step in range(1, steps + 1):
            both = (torch.tanh(z) + 1) / 2
            m, p = both[:1], both[1:]
            scores = torch.cat([model((((1 - m) * x + m * p) - 0.25)[None] / 0.5) for x in pixels])
            loss = F.cross_entropy(scores, torch.full((len(pixels),), target)) + lam * m.abs().sum()
            reached = float((scores.argmax(1) == target).double().mean())
            (g,) = torch.autograd.grad(loss, z)
            size = float(m.detach().sum())
            if reached >= success and size < smallest:
                best, smallest = both.detach(), size
            elif math.isinf(smallest):
                best = both.detach()
            first, second = 0.5 * first + 0.5 * g, 0.9 * second + 0.1 * g * g
            rate = 0.1 * math.sqrt(1 - 0.9**step) / (1 - 0.5**step)
            z = (z - rate * first / (second.sqrt() + 1e-8 * math.sqrt(1 - 0.9**step))).detach().requires_grad_(True)
            runs = [runs[0] + 1, 0] if reached >= success else [0, runs[1] + 1]
            if runs[0] == patience:
                lam, runs = lam * 2, [0, 0]
            if runs[1] == patience:
                lam, runs = lam / 2**1.5, [0, 0]
        masks.append(best[:1])
        patterns.append(best[1:])
    return torch.stack(masks), torch.stack(patterns)


def test_all_classes_together_are_each_class_by_itself(small_cnn: SmallCNN, digits: Dataset) -> None:
    encode = ImageEncoder(mean=(0.25,), std=(0.5,), channels=1)
    data = dataclasses.replace(digits.select(range(12)), encode=encode)
    model = small_cnn.double()
    settings = {"steps": 12, "cost": 0.02, "success": 0.75, "patience": 2}
    triggers = MaskSearch(batch_size=12, **settings).smallest(model, data, a_run(seed=3))
    mask, pattern = by_the_formula(model, data.items.double() / 255, seed=3, **settings)
    assert torch.allclose(triggers.masks, mask, atol=1e-5)
    assert torch.allclose(triggers.patterns, pattern, atol=1e-5)


def test_chunks_change_nothing(small_cnn: SmallCNN, digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = digits.select(range(40)), small_cnn.double()
    search = MaskSearch(steps=3, batch_size=20)
    whole = search.smallest(model, data, a_run())  # 6 classes of 20 examples at a time
    monkeypatch.setattr(Arithmetic, "evaluation_batch", 20)
    single = search.smallest(model, data, a_run())
    assert torch.allclose(whole.masks, single.masks, atol=1e-9)


def test_a_planted_trigger_is_found_and_unlearned(backdoored: tuple, digits: Dataset) -> None:
    model, stamped, test = backdoored
    method = purifiers.NeuralCleanse(steps=100, epochs=10)
    result = purify(model, digits.select(range(300)), method, seed=0, device="cpu")
    assert result.record["notes"][0].startswith("Neural Cleanse: outliers 3")
    with torch.no_grad():
        assert (model(stamped).argmax(1) == 3).double().mean() > 0.9
        assert (result.model(stamped).argmax(1) == 3).double().mean() < 0.2
        labels = digits.labels[1000:1400]
        assert (result.model(test).argmax(1) == labels).double().mean() > 0.9


def test_without_an_outlier_all_triggers_are_unlearned_and_the_record_says_so(
    small_cnn: SmallCNN, digits: Dataset
) -> None:
    method = purifiers.NeuralCleanse(steps=2, epochs=1, threshold=1e6)
    result = purify(small_cnn, digits.select(range(60)), method, seed=0)
    assert result.record["notes"][0].startswith("Neural Cleanse: no class is an outlier (the smallest trigger is")
    assert result.record["notes"][1] == "Neural Cleanse: the triggers of all classes are taken."


def test_the_search_alone_has_the_defaults_of_the_method() -> None:
    method = purifiers.NeuralCleanse()
    assert MaskSearch() == MaskSearch(
        steps=method.steps,
        batch_size=method.search_batch,
        cost=method.cost,
        success=method.success,
        patience=method.patience,
        threshold=method.threshold,
    )
