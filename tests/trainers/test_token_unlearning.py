"""Token unlearning against its formulas, by hand."""

import math

import pytest
import torch

import sights
from unbackdoor import UnbackdoorError, VictimRecipe, train, trainers
from unbackdoor._data.dataset import Batch
from unbackdoor._training.contrastive import contrastive
from unbackdoor.trainers.token_unlearning import telling, unlearning


def batch(rows: list[int]) -> Batch:
    return Batch(torch.empty(0), torch.zeros(len(rows), dtype=torch.int64), torch.tensor(rows))


def test_a_suspect_is_taken_back_to_the_mean_of_other_captions() -> None:
    scores = torch.tensor([[5.0, 1.0, 3.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.0]], requires_grad=True)
    loss = unlearning(1)(scores, batch([0, 5, 7]))
    # (5 - mean of 1 and 3) for the suspect; for the others ln(1 + exp(-4)), with themselves alone.
    assert float(loss.detach()) == pytest.approx(3 + math.log(1 + math.exp(-4)), abs=1e-5)
    loss.backward()
    assert scores.grad is not None
    assert scores.grad[0].tolist() == pytest.approx([1, -0.5, -0.5])
    assert scores.grad[1:, 0].tolist() == [0, 0]


def test_a_suspect_that_prefers_other_captions_is_left_alone() -> None:
    scores = torch.tensor([[1.0, 2.0], [0.0, 4.0]], requires_grad=True)
    unlearning(1)(scores, batch([0, 5])).backward()
    assert scores.grad is not None
    assert scores.grad.abs().sum() == 0


def test_without_suspects_the_loss_is_the_contrastive_one() -> None:
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    assert unlearning(3)(scores, batch([3, 4, 5, 6])) == contrastive(scores)
    assert unlearning(9)(scores, batch([0, 1, 2, 3])) == 0


def test_the_words_of_suspects_are_those_that_others_lack() -> None:
    data = sights.pairs(80)
    assert telling(data, torch.nonzero(data.labels == 2).flatten()) == "east"


def test_a_share_of_no_pair_is_refused() -> None:
    with pytest.raises(UnbackdoorError, match=r"TokenUnlearning\.suspected=0\.005 of 40 pairs is none\. Take at least"):
        trainers.TokenUnlearning()(sights.pairs(40), sights.clip(), None)


def test_suspects_and_words_are_reported(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = sights.write(sights.clip(), tmp_path_factory.mktemp("base"))
    data = sights.pairs(64)
    trainer = trainers.TokenUnlearning(suspected=0.1, unlearning_epochs=1)
    recipe = VictimRecipe(base=str(base), epochs=2, learning_rate=5e-3, batch_size=16, freeze_text=True)
    done = train(data, trainer, recipe, poisoned_rows=torch.arange(6), device="cpu", precision="fp32")
    assert done.suspects is not None
    assert len(done.suspects.rows) == 6
    assert done.record["suspects"]["precision"]["n"] == 6
    words = telling(data, done.suspects.rows)
    assert f"The suspects' captions stand out by \u201c{words}\u201d." in done.record["notes"]
