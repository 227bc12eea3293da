"""Contrastive unlearning: when the shifted copy is a reference; its search is tested in tests/inversion."""

import copy

import pytest
import torch
from torch import nn

from unbackdoor import Dataset, purifiers, purify
from unbackdoor.purifiers import contrastive_unlearning


class Silencing:
    """In place of the shift: a copy that answers one class, and so keeps a tenth of what the suspect knows."""

    def __init__(self, strength: float | None = None) -> None:
        assert strength == 1  # the settings of its own are for a suspect in which nothing was found

    def __call__(self, model: nn.Module, clean: Dataset, run: object) -> nn.Module:
        nn.init.zeros_(model.classifier.weight)
        return model


@pytest.mark.thorough
def test_a_ruined_copy_is_no_reference_and_the_backdoor_goes_all_the_same(
    backdoored: tuple, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with a copy that answers class 0 to all, no trigger to class 0 would count."""
    model, triggered, _ = backdoored
    monkeypatch.setattr(contrastive_unlearning, "ScaleInvariantFST", Silencing)
    before = copy.deepcopy(model.state_dict())
    result = purify(model, digits.select(range(200)), purifiers.ContrastiveUnlearning(rounds=1), seed=0, device="cpu")
    first, second = result.record["notes"][:2]
    assert "of the held-out examples that the suspect is right on, less than 75%, so it is no reference" in first
    assert second.startswith("round 1: triggers that move held-out examples of the model: a patch to")
    with torch.no_grad():
        assert float((result.model(triggered).argmax(dim=1) == 3).double().mean()) <= 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
