"""Examples without labels next to the clean ones: who gets them, what is refused, and that no label is seen."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fixtures import SmallCNN
from unbackdoor import Dataset, Run, UnbackdoorError, purifiers, purify
from unbackdoor._purification.method import uses_unlabelled
from unbackdoor._registry.purifiers import REGISTRY


def test_a_method_gets_them_without_their_labels(small_cnn: SmallCNN, digits: Dataset) -> None:
    seen: list[Dataset | None] = []

    def looking(model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        seen.append(run.unlabelled)
        return model

    clean, others = digits.select(range(100)), digits.select(range(100, 130))
    record = purify(small_cnn, clean, looking, unlabelled=others).record
    assert record["unlabelled"] == 30
    assert seen[0] is not None
    assert seen[0].labels.tolist() == [-1] * 30
    assert torch.equal(seen[0].pixels, others.pixels)
    assert others.labels.min() >= 0  # the caller's own stay
    assert "unlabelled" not in purify(small_cnn, clean, looking).record
    assert seen[1] is None


def test_clean_examples_among_them_are_left_out(small_cnn: SmallCNN, digits: Dataset) -> None:
    """A method that holds some of them out would be judged on what it was tuned on."""
    seen: list[torch.Tensor] = []

    def looking(model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        assert run.unlabelled is not None
        seen.append(run.unlabelled.pixels)
        return model

    clean = digits.select(range(100))
    record = purify(small_cnn, clean, looking, unlabelled=digits.select(range(80, 130))).record
    assert torch.equal(seen[0], digits.pixels[100:130])
    assert record["unlabelled"] == 30
    assert record["notes"] == ["20 of the unlabelled examples are clean ones as well; they are left out."]
    with pytest.raises(
        UnbackdoorError, match=r"^`unlabelled` holds only examples of .*\. Give others, or leave it out"
    ):
        purify(small_cnn, clean, looking, unlabelled=digits.select(range(50)))


def test_a_method_that_uses_none_refuses_them(small_cnn: SmallCNN, digits: Dataset) -> None:
    clean = digits.select(range(100))
    with pytest.raises(UnbackdoorError, match=r"^FST uses no unlabelled examples\. Leave `unlabelled` out, or take "):
        purify(small_cnn, clean, purifiers.FST(epochs=1), unlabelled=clean)


def test_what_is_refused(small_cnn: SmallCNN, digits: Dataset, reviews: Dataset) -> None:
    clean, method = digits.select(range(100)), purifiers.ScaleInvariantFST(strength=1, epochs=1)
    with pytest.raises(UnbackdoorError, match=r"^purify takes unlabelled as a Dataset, got Tensor\. Load it with "):
        purify(small_cnn, clean, method, unlabelled=clean.pixels)
    with pytest.raises(UnbackdoorError, match=r"^`unlabelled` must hold images as .* does, but .* holds text\. Give"):
        purify(small_cnn, clean, method, unlabelled=reviews)
    colour = replace(clean, items=clean.pixels.expand(-1, 3, -1, -1))
    with pytest.raises(UnbackdoorError, match="channel"):
        purify(small_cnn, clean, method, unlabelled=colour)


def test_registered_methods_declare_it() -> None:
    """A composition uses them if one of its steps does."""
    using = {entry.name for entry in REGISTRY if getattr(entry.resolve(), "uses_unlabelled", False)}
    assert using == {"scale-invariant-fst", "auto"}
    assert uses_unlabelled(purifiers.Then(purifiers.EPUR(), purifiers.ScaleInvariantFST()))
    assert not uses_unlabelled(purifiers.Then(purifiers.EPUR(), purifiers.FST()))
