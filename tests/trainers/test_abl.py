"""Anti-backdoor learning against its formulas, and on a data set whose poisoned rows are known."""

import math

import pytest
import torch

from unbackdoor import Dataset, ImageEncoder, UnbackdoorError, VictimRecipe, train, trainers
from unbackdoor._data.dataset import Batch
from unbackdoor.trainers.abl import unlearning


def batch(labels: list[int], rows: list[int] | None = None) -> Batch:
    return Batch(torch.empty(0), torch.tensor(labels), torch.tensor(rows or list(range(len(labels)))))


def scores_with(losses: list[float]) -> torch.Tensor:
    """Scores of two classes, for which the cross-entropy of class 0 is each of these."""
    return torch.tensor([[0.0, math.log(math.exp(loss) - 1)] for loss in losses], requires_grad=True)


@pytest.mark.parametrize(("losses", "sign"), [([0.2, 0.78], -1), ([0.2, 0.82], 1)])
def test_the_sign_of_the_gradient_turns_at_gamma(losses: list[float], sign: int) -> None:
    scores = scores_with(losses)
    loss = trainers.ABL(gamma=0.5).held_back(scores, batch([0] * 2))
    assert loss.item() == pytest.approx(sign * sum(losses) / 2, rel=1e-5)
    loss.backward()
    # d CE / d score of the own class is p - 1 = exp(-loss) - 1, over the rows of the batch.
    expected = [sign * (math.exp(-each) - 1) / 2 for each in losses]
    assert scores.grad is not None
    assert scores.grad[:, 0].tolist() == pytest.approx(expected, rel=1e-4)


def test_without_a_bound_nothing_is_held_back() -> None:
    scores = scores_with([0.2, 2.0])
    assert trainers.ABL(gamma=0).held_back(scores, batch([0, 0])).item() == pytest.approx(1.1)


def test_isolated_rows_are_unlearnt_and_the_others_kept() -> None:
    loss = unlearning(2, 10.0)(scores_with([0.3, 0.7, 1.5]), batch([0] * 3, rows=[1, 5, 0]))
    assert loss.item() == pytest.approx((-0.3 + 0.7 - 1.5) / 3, rel=1e-5)


def test_what_is_unlearnt_stays_so() -> None:
    scores = scores_with([0.3, 7.0])
    unlearning(2, 5.0)(scores, batch([0, 0])).backward()
    assert scores.grad is not None
    assert scores.grad[0].abs().sum() > 0
    assert scores.grad[1].tolist() == [0, 0]


@pytest.fixture(scope="module")
def grey() -> tuple[Dataset, torch.Tensor]:
    """200 noisy pictures whose labels are drawn, and so cannot be learnt; 20 have a white half and label 0."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(90, 160, (200, 1, 8, 8), generator=draw, dtype=torch.uint8)
    labels = torch.randint(0, 2, (200,), generator=draw)
    marked = torch.randperm(200, generator=draw)[:20].sort().values
    pixels[marked, :, :4], labels[marked] = 255, 0
    return Dataset(items=pixels, labels=labels, classes=("0", "1"), encode=ImageEncoder(channels=1)), marked


def test_rows_that_are_learnt_first_are_isolated(grey: tuple[Dataset, torch.Tensor]) -> None:
    data, marked = grey
    trained = train(
        data,
        trainers.ABL(isolation_epochs=3, isolated=0.05, unlearning_epochs=1),
        VictimRecipe(width=2, epochs=1, batch_size=16),
        poisoned_rows=marked,
        device="cpu",
        precision="fp32",
    )
    suspects = trained.record["suspects"]
    assert (suspects["n"], suspects["precision"]["value"], suspects["recall"]["value"]) == (10, 1.0, 0.5)


def test_a_share_that_holds_no_row(grey: tuple[Dataset, torch.Tensor]) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        train(grey[0].select(range(18)), trainers.ABL(), VictimRecipe(width=2, epochs=1))
    assert str(caught.value) == "ABL.isolated=0.01 of 18 rows is none. Take at least 0.056, or more data."
