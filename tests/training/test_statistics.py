"""BatchNorm of an unusual momentum: one that forgets all but the last batch (MobileNet v1 and v2 of transformers), one
that hardly follows (0.01 in MobileNet v3), and none, which averages over all batches there ever were.
"""

import pytest
import torch
from torch import nn

from unbackdoor import Dataset, purify
from unbackdoor._purification.run import Run
from unbackdoor.purifiers import FineTuning, ScaleInvariantFST


class First(nn.Sequential):
    """BatchNorm on the pixels themselves, whose statistics are known without training."""

    def __init__(self, momentum: float | None) -> None:
        super().__init__(
            nn.BatchNorm2d(1, momentum=momentum),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(64, 10),
        )


def purified(momentum: float | None, data: Dataset, *, batch_size: int = 50) -> nn.BatchNorm2d:
    torch.manual_seed(0)
    method = FineTuning(epochs=1, batch_size=batch_size)
    return purify(First(momentum).eval(), data, method, seed=0, precision="fp32").model[0]


@pytest.mark.parametrize("batch_size", [50, 48])
def test_a_large_momentum_ends_with_the_statistics_of_all(batch_size: int, digits: Dataset) -> None:
    """The last batch of 48 would be of 8 digits; it does not count."""
    data = digits.select(range(200))
    layer = purified(0.997, data, batch_size=batch_size)
    pixels = data.inputs(slice(200)).double()
    exact = batch_size == 50
    assert layer.running_mean.item() == pytest.approx(pixels.mean().item(), rel=1e-5 if exact else 0.02)
    assert layer.running_var.item() == pytest.approx(pixels.var().item(), rel=0.01)
    assert layer.momentum == 0.997


def test_without_it_the_last_batch_would_decide(digits: Dataset) -> None:
    """A momentum of 0.5 is not large, and half of the statistics are of the last eight digits."""
    data = digits.select(range(200))
    few, all_of_them = (purified(momentum, data, batch_size=48).running_mean.item() for momentum in (0.5, 0.997))
    assert abs(few - all_of_them) > 0.001


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_a_usual_momentum_keeps_its_statistics(momentum: float | None, digits: Dataset) -> None:
    """By hand: two batches of the same 40 digits, by torch's own rule."""
    data = digits.select(range(40))
    layer = purified(momentum, data, batch_size=40)
    plain = nn.BatchNorm2d(1, momentum=momentum).train()
    plain(data.inputs(slice(40)))
    assert layer.running_mean.item() == pytest.approx(plain.running_mean.item(), rel=1e-5)
    assert layer.running_var.item() == pytest.approx(plain.running_var.item(), rel=1e-5)


@pytest.mark.parametrize("momentum", [0.01, 0.05, None])
def test_a_momentum_that_hardly_follows_ends_with_the_statistics_of_the_data(
    momentum: float | None, digits: Dataset
) -> None:
    """The model had others when it came, after a long training elsewhere."""
    data = digits.select(range(200))
    model = First(momentum).eval()
    model[0].running_mean.fill_(-3.0)
    model[0].num_batches_tracked.fill_(10_000)
    layer = purify(model, data, FineTuning(epochs=2, batch_size=50), seed=0, precision="fp32").model[0]
    assert layer.running_mean.item() == pytest.approx(data.inputs(slice(200)).double().mean().item(), rel=1e-5)
    assert layer.momentum == momentum


@pytest.mark.parametrize(("momentum", "left"), [(0.09, 0.91**40), (0.1, 0.9**4), (0.0, 1.0)])
def test_a_momentum_that_follows_keeps_its_statistics(momentum: float, left: float, digits: Dataset) -> None:
    """By torch's rule (1 - momentum)^steps of the old mean are left: few, as usual, or as its maker wants it."""
    data = digits.select(range(200))
    model = First(momentum).eval()
    model[0].running_mean.fill_(1000.0)
    epochs = 10 if momentum == 0.09 else 1
    layer = purify(model, data, FineTuning(epochs=epochs, batch_size=50), seed=0, precision="fp32").model[0]
    assert layer.running_mean.item() == pytest.approx(1000 * left, abs=1)


def test_layers_that_a_method_holds_still_stay(digits: Dataset) -> None:
    model = First(0.997).eval()
    before = model[0].running_mean.clone()

    def method(mine: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        def hold() -> None:
            mine[0].eval()

        run.tune(mine, clean, epochs=1, before_epoch=hold)
        return mine

    held = purify(model, digits.select(range(100)), method, seed=0).model[0]
    assert torch.equal(held.running_mean, before)


def test_every_method_that_tunes_has_it(digits: Dataset) -> None:
    """The shift as well, in three batches of 30."""
    data = digits.select(range(90))
    torch.manual_seed(0)
    method = ScaleInvariantFST(strength=1, epochs=1, batch_size=30)
    layer = purify(First(0.997).eval(), data, method, seed=0, precision="fp32").model[0]
    assert layer.running_mean.item() == pytest.approx(data.inputs(slice(90)).mean().item(), rel=1e-4)
