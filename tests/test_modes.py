"""Modes of torch that a notebook has set for all that follows."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbackdoor as ub
from pictures import write_pictures
from unbackdoor import detectors, purifiers
from unbackdoor._data.dataset import Dataset

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: torch.device("meta"),  # stands for a GPU, on which others make all of their tensors
}


def switches() -> tuple[Any, ...]:
    cached, device = torch.is_autocast_cache_enabled(), torch.get_default_device()
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), cached, device


@pytest.fixture
def trained(small_cnn: nn.Module, digits: Dataset) -> nn.Module:
    """Well above chance, since an audit says nothing of a model near it."""
    optimizer = torch.optim.Adam(small_cnn.parameters(), 0.01)
    for _ in range(40):
        F.cross_entropy(small_cnn(digits.inputs(slice(400))), digits.labels[:400]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return small_cnn.eval()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.thorough)])
def test_a_purification_is_the_same_in_every_mode(
    mode: str, precision: Any, trained: nn.Module, digits: Dataset
) -> None:
    method, clean = purifiers.FineTuning(epochs=2), digits.select(range(100))
    expected = ub.purify(trained, clean, method, device="cpu", precision=precision).model
    with MODES[mode]():
        before = switches()
        clean = digits.select(range(100))
        purified = ub.purify(trained, clean, method, device="cpu", precision=precision)
        score = ub.evaluate(purified.model, clean, device="cpu", precision="fp32")
        assert switches() == before
    assert all(torch.equal(tensor, purified.model.state_dict()[name]) for name, tensor in expected.state_dict().items())
    assert score == ub.evaluate(expected, clean, device="cpu", precision="fp32")


@pytest.mark.thorough
@pytest.mark.parametrize("mode", MODES)
def test_an_audit_is_the_same_in_every_mode(mode: str, trained: nn.Module, digits: Dataset) -> None:
    """Without gradients a search found nothing, or stopped, and the verdict said so of the model."""
    found = []
    for context in (MODES[mode], torch.enable_grad):
        with context():
            chosen = [detectors.Noise(), detectors.Margin()]
            report = ub.audit(trained, digits.select(range(200)), detectors=chosen, device="cpu", precision="fp32")
            found.append([(each.detector, each.strongest.score) for each in report.findings])
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_data_are_on_the_processor_whatever_the_default_device(digits: Dataset, tmp_path: Path) -> None:
    source = write_pictures(digits.select(range(20)), tmp_path / "d.parquet")
    with torch.device("meta"):
        data = Dataset.load(source)
        parts = data.split(10, seed=0)
    assert {each.device.type for part in (data, *parts) for each in (part.pixels, part.labels)} == {"cpu"}
    assert data.labels.tolist() == digits.labels[:20].tolist()
