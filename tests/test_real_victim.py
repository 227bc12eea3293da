"""A real victim, trained by this project on real CIFAR-10 (Blended, poison rate 1 %), purified and scored on real data.

`tests/victim` is a directory as `unbackdoor attack` wrote it, in half precision. Its training is described in
docs/results/fst.md, and its `record.json` has what repeats it.
"""

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from unbackdoor import Dataset, Score, evaluate, load, purifiers, purify

VICTIM = Path(__file__).parent / "victim"


@pytest.fixture(scope="module")
def parts(shared_data: Path) -> tuple[nn.Module, Dataset, Dataset]:
    """The victim, 300 images that it never saw, and 600 others."""
    model, encode = load(VICTIM)
    images = Dataset.load(shared_data / "vision/cifar10/validation.parquet", encode)
    clean, rest = images.split(300, seed=0)
    return model.float(), clean, rest.split(600, seed=0)[0]


def scored(model: nn.Module, test: Dataset) -> Score:
    return cast(Score, evaluate(model, test, attack=VICTIM / "attack.json", device="cpu"))


def test_half_precision_is_kept(parts: tuple[nn.Module, Dataset, Dataset]) -> None:
    model, _ = load(VICTIM)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_the_backdoor_is_there(parts: tuple[nn.Module, Dataset, Dataset]) -> None:
    model, _, test = parts
    before = scored(model, test)
    assert before.clean_accuracy.value > 0.8
    assert before.attack_success is not None
    assert before.attack_success.value > 0.97


@pytest.mark.thorough
@pytest.mark.long
def test_fine_tuning_leaves_it_and_fst_removes_it(parts: tuple[nn.Module, Dataset, Dataset]) -> None:
    model, clean, test = parts
    tuned = scored(
        purify(model, clean, purifiers.FineTuning(epochs=3, batch_size=32), seed=0, device="cpu").model, test
    )
    assert tuned.attack_success is not None
    assert tuned.attack_success.value > 0.9
    shifted = scored(purify(model, clean, purifiers.FST(epochs=4, batch_size=32), seed=0, device="cpu").model, test)
    assert shifted.attack_success is not None
    assert shifted.attack_success.value < 0.05
    assert shifted.clean_accuracy.value > 0.72
