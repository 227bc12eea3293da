"""A foldable skip connection is removed for good; an identity comes back; a model without either is refused."""

import pytest
import torch

from fixtures import SmallCNN
from unbackdoor import Dataset, UnbackdoorError, archs, purifiers, purify

CLASSES = [str(label) for label in range(10)]
QUICK = purifiers.ShortcutSuppression(epochs=1, batch_size=16, reverse_steps=2)


def test_a_projection_is_folded_away(digits: Dataset) -> None:
    torch.manual_seed(0)
    model = archs.build("resnet18", classes=CLASSES, channels=1, image_size=8, width=2)
    result = purify(model, digits.select(range(60)), QUICK, seed=0)
    ends = [result.model.stages[stage][0].shortcut[1] for stage in (1, 2, 3)]
    silent = [bool((norm.weight == 0).all() and (norm.bias == 0).all()) for norm in ends]
    assert sum(silent) == 1
    number = {0: 3, 1: 5, 2: 7}[silent.index(True)]
    assert result.record["notes"][-1:] == [f"ShortcutSuppression removed shortcut {number} of 8, for good."]
    assert result.record["clean"]["held_out"] == 12


def test_an_identity_comes_back(digits: Dataset) -> None:
    torch.manual_seed(0)
    model = archs.build("preact-resnet18", classes=CLASSES, channels=1, image_size=8, width=2)
    result = purify(model, digits.select(range(60)), QUICK, seed=0)
    assert result.record["notes"][-1].endswith("of 8, while tuning, as no BatchNorm ends it that could be zeroed.")
    assert not result.model._forward_hooks


def test_a_model_without_skip_connections_is_refused(small_cnn: SmallCNN, digits: Dataset) -> None:
    message = r"^ShortcutSuppression needs skip connections; SmallCNN has none\. Try fine-pruning\.$"
    with pytest.raises(UnbackdoorError, match=message):
        purify(small_cnn, digits.select(range(60)), QUICK)
