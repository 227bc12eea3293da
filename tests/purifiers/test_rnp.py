"""RNP: unlearning unlearns, the mask is in [0, 1], and the suspect loses channels and nothing else."""

import copy

import pytest
import torch

from fixtures import SmallCNN
from toys import a_run
from unbackdoor import Dataset, UnbackdoorError, purifiers, purify


@pytest.fixture
def trained(small_cnn: SmallCNN, digits: Dataset) -> SmallCNN:
    method = purifiers.FineTuning(epochs=5, learning_rate=0.05)
    return purify(small_cnn, digits.select(range(1000)), method, seed=0).model  # type: ignore[return-value]


def test_forget_recover_and_prune(trained: SmallCNN, digits: Dataset) -> None:
    data = digits.select(range(200))
    run = a_run(model=trained)
    method = purifiers.RNP(epochs=5, batch_size=32)
    trial = copy.deepcopy(trained)
    before = run.accuracy(trial, data).value
    method.forget_(trial, data, run)
    assert before > 0.9
    assert run.accuracy(trial, data).value < 0.4
    assert run.examples_seen < 20 * 200  # it stopped when it had forgotten
    masks = method.recover(trial, data, run)
    assert [len(mask) for mask in masks] == [16, 32]
    assert all(float(mask.min()) >= 0 and float(mask.max()) <= 1 for mask in masks)
    assert any(float(mask.min()) < 0.9 for mask in masks)

    result = purify(trained, data, purifiers.RNP(epochs=5, batch_size=32, tolerance=0.2), seed=0)
    old, new = trained.state_dict(), result.model.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed <= {"features.1.weight", "features.5.weight"}
    assert all(((new[name] == old[name]) | (new[name] == 0)).all() for name in changed)
    assert run.accuracy(result.model, data).value > before - 0.3
    assert result.record["notes"][0].startswith("RNP pruned ")


def test_a_model_without_batchnorm_is_refused(digits: Dataset, small_vit: torch.nn.Module) -> None:
    with pytest.raises(
        UnbackdoorError,
        match=r"^RNP needs BatchNorm layers with weights and statistics; ViTForImageClassification has none\.",
    ):
        purify(small_vit, digits.select(range(60)), purifiers.RNP())
