"""STRIP: entropies whose answer is known, and the copies that they are averaged over."""

import math

import pytest
import torch
from torch import Tensor, nn

import toys
from unbackdoor import Dataset, ImageEncoder, guards
from unbackdoor._purification.run import Run
from unbackdoor.guards._words import exchanged, without


class Scores(nn.Module):
    """Answers with the same class scores whatever it gets."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores))

    def forward(self, x: Tensor) -> Tensor:
        return self.scores.expand(len(x), -1)


class Mean(nn.Module):
    """Two classes; the score of the second is the mean of the picture."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(dim=1)
        return torch.stack([torch.zeros_like(mean), mean], dim=1)


def pictures(*levels: int) -> Dataset:
    """Pictures of 2x2 pixels, each of one level."""
    items = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()
    return Dataset(items=items, labels=torch.zeros(len(levels), dtype=torch.int64), encode=ImageEncoder())


@pytest.fixture
def run() -> Run:
    return toys.a_run(modality="images")


@pytest.mark.parametrize(("scores", "bits"), [([0.0] * 10, math.log2(10)), ([200.0, 0.0, 0.0], 0.0), ([5.0, 5.0], 1.0)])
def test_the_entropy_of_a_constant_classifier_is_that_of_its_answer(scores: list[float], bits: float, run: Run) -> None:
    inputs = pictures(0, 50, 255)
    strip = guards.Strip(copies=3)
    model = Scores(scores)
    found = strip.scores(model, inputs, strip(model, inputs, run), run).scores
    assert found.tolist() == pytest.approx([bits] * 3, abs=1e-6)


def test_a_copy_is_the_sum_with_a_clean_picture_cut_at_white(run: Run) -> None:
    strip = guards.Strip(copies=2, share=0.5)
    learnt = strip(Mean(), pictures(100), run)
    found = strip.scores(Mean(), pictures(10, 250), learnt, run).scores
    for score, level in zip(found.tolist(), (60, 255), strict=True):  # 10 + 50, and 250 + 50 cut
        p = 1 / (1 + math.exp(-level / 255))
        assert score == pytest.approx(-p * math.log2(p) - (1 - p) * math.log2(1 - p))


def test_the_entropy_of_a_picture_is_that_of_its_own_copies(run: Run) -> None:
    """An average over copies of different inputs, as published code takes it, would not follow its input."""
    strip = guards.Strip(copies=4)
    inputs = pictures(*range(0, 250, 10))
    learnt = strip(Mean(), inputs, run)
    found = strip.scores(Mean(), inputs, learnt, run).scores
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    again = strip.scores(Mean(), inputs.select(order), learnt, run).scores
    assert torch.equal(again, found[order])
    assert len(set(found.tolist())) > 20


def test_a_share_of_the_words_of_a_text_is_exchanged() -> None:
    run = toys.a_run(modality="text")
    strip = guards.Strip(copies=3, share=0.5)
    clean = toys.dataset([("great great",), ("great",)], [1, 1])
    model = toys.Counting({"cf": 4.0, "great": -1.0})
    learnt = strip(model, clean, run)
    scores = strip.scores(model, toys.dataset([("cf cf cf cf",), ("great great",), ("cf",)], [1, 1, 1]), learnt, run)

    def entropy(score: float) -> float:  # of class 1, of a model that answers (-score, score)
        p = 1 / (1 + math.exp(-2 * score))
        return -p * math.log2(p) - (1 - p) * math.log2(1 - p)

    around = model.words.weight[[2, 3], 0].sum().item()  # [CLS] and [SEP]
    expected = [entropy(2 * 4.0 - 2.0 + around), entropy(-2.0 + around), entropy(4.0 + around)]  # one word: none
    assert scores.scores.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("text", "said"), [("这部电影很好看", True), ("this film is good", False)])
def test_texts_without_spaces_have_nothing_to_exchange(text: str, said: bool) -> None:
    run, strip = toys.a_run(modality="text"), guards.Strip()
    learnt = strip(toys.Counting({}), toys.dataset([(text,)] * 3, [1, 1, 0]), run)
    warnings = [
        "Strip exchanges words between spaces, and 3 of 3 clean texts have too few of them (Chinese has none): their "
        "scores show how sure the model is, and nothing else. Try badacts."
    ]
    assert run.warnings == (warnings if said else [])
    assert set(learnt) == {"words"}


def test_words_are_changed_and_spaces_stay() -> None:
    assert exchanged("  a  dull\tfilm ", {1: "fine", 2: "cast"}) == "  a  fine\tcast "
    assert without("  a  dull\tfilm ", {1}) == "  a  film "
    assert without("a dull film", {0}) == "dull film"
    assert without("a dull film", {1, 2}) == "a"
    assert without("a dull film", {0, 1, 2}) == ""
