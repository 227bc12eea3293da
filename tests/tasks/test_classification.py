"""The decisions of a task in place of the runner and the evaluator."""

import dataclasses
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import toys
from fixtures import SmallCNN
from unbackdoor import Dataset, UnbackdoorError, evaluate, purifiers, purify
from unbackdoor._models.arithmetic import choose
from unbackdoor._tasks.classification import CLASSIFICATION, Classification, hits
from unbackdoor._tasks.proportion import Proportion, chance_doubt


class FlatLoss(Classification):
    """A loss with no slope, under which tuning moves nothing."""

    def loss(self, scores, batch):
        return 0 * scores.sum()


def test_tuning_minimises_the_loss_of_the_task(small_cnn: SmallCNN, digits: Dataset) -> None:
    before = small_cnn.classifier.weight.detach().clone()
    toys.a_run(model=small_cnn, task=FlatLoss()).tune(small_cnn, digits.select(range(64)), epochs=1)
    assert torch.equal(small_cnn.classifier.weight, before)
    toys.a_run(model=small_cnn).tune(small_cnn, digits.select(range(64)), epochs=1)
    assert not torch.equal(small_cnn.classifier.weight, before)


def test_examined_examples_are_numbered_as_the_model_numbers_its_classes(
    text_victim: torch.nn.Module, reviews: Dataset
) -> None:
    """The model calls its classes negative and positive; here the data numbers them the other way round."""
    text_victim.config.id2label = {0: "negative", 1: "positive"}
    data = reviews.select(range(60))
    turned = dataclasses.replace(data, labels=1 - data.labels, classes=("positive", "negative"))
    arithmetic = choose(text_victim, "cpu", "fp32")
    examined = [CLASSIFICATION.examined(text_victim, each, arithmetic, pytest.fail) for each in (data, turned)]
    assert torch.equal(examined[0].clean.labels, examined[1].clean.labels)
    assert torch.equal(examined[0].outcomes, examined[1].outcomes)
    assert examined[0].outcomes.float().mean() > 0.9
    assert examined[0].head_name == "classifier"
    assert examined[0].per_class == tuple(torch.bincount(data.labels).tolist())


def test_examples_of_one_class_alone_are_refused(small_cnn: SmallCNN, digits: Dataset) -> None:
    ones = digits.select((digits.labels == 1).nonzero().flatten()[:20])
    with pytest.raises(UnbackdoorError, match="digits holds one class only"):
        CLASSIFICATION.examined(small_cnn, ones, choose(small_cnn, "cpu", "fp32"), logging.warning)


def test_a_score_near_chance_is_doubted(small_cnn: SmallCNN, digits: Dataset) -> None:
    arithmetic = choose(small_cnn, "cpu", "fp32")
    score = CLASSIFICATION.score(small_cnn, digits, None, arithmetic)
    doubt = CLASSIFICATION.doubt("the model", score, 10, "digits")
    assert doubt is not None
    assert doubt.startswith("the model is near chance on digits (")
    right = Proportion(2, 2)
    assert chance_doubt("the model", right, 2, "digits") == (
        f"the model cannot be told from chance on digits ({right!r}): there are too few examples. Add some."
    )
    assert chance_doubt("the model", Proportion(40, 40), 2, "digits") is None


def test_answers_that_are_not_finite_count_as_wrong(caplog: pytest.LogCaptureFixture) -> None:
    """As half precision gives them for some examples: the largest of them would be any class, here always the first."""

    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            scores = torch.stack([1 - x[:, 0, 0, 0], x[:, 0, 0, 0]], dim=1)
            return scores.masked_fill((x[:, 0, 0, :1] > 0.9), float("nan"))

    pixels = torch.tensor([0, 0, 0, 200, 200, 255, 255, 255, 255, 255, 255], dtype=torch.uint8).view(-1, 1, 1, 1)
    labels = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1])
    data = Dataset(items=pixels, labels=labels, name="some")
    model = Overflowing().eval()
    arithmetic = choose(model, "cpu", "fp32")
    assert hits(model, data, arithmetic).tolist() == [True, True, False, True, True, *[False] * 6]
    assert caplog.messages == [
        "Overflowing answers 6 of 11 examples of some with values that are not finite; they count as wrong. Try "
        "`precision='fp32'`, or look at its buffers."
    ]
    score = CLASSIFICATION.score(model, data, None, arithmetic)
    assert score.clean_accuracy.count == 4
    assert {name: part.count for name, part in score.per_class.items()} == {"0": 2, "1": 2}


class Failing(SmallCNN):
    """Takes the first examples, and fails later for some reason."""

    def __init__(self, reason: str, when: Callable[[nn.Module, Tensor], bool]) -> None:
        super().__init__()
        self.reason, self.when = reason, when

    def forward(self, x: Tensor) -> Tensor:
        if self.when(self, x):
            raise RuntimeError(self.reason)
        return super().forward(x)


def test_a_model_that_fails_after_its_first_batch_is_explained(digits: Dataset) -> None:
    data = digits.select(range(40))
    long = Failing("index out of range", lambda _, x: len(x) > 8).eval()
    with pytest.raises(UnbackdoorError) as refusal:
        evaluate(long, data)
    assert str(refusal.value) == (
        "Failing cannot take inputs of shape (40, 1, 8, 8) (index out of range). Take data of the size and the "
        "channels that it was trained on, or give `image_size`."
    )
    untrained = Failing("a length of 40 is expected", lambda model, _: model.training).eval()
    assert evaluate(untrained, data).clean_accuracy.n == 40
    with pytest.raises(UnbackdoorError) as refusal:
        purify(untrained, data, purifiers.FineTuning(epochs=1))
    assert str(refusal.value) == (
        "Failing answers, but fails in training mode (a length of 40 is expected), so it cannot be tuned. Take inputs "
        "that it was trained on, or another model."
    )
    half = Failing("got Float and BFloat16", lambda *_: torch.is_autocast_enabled("cpu")).eval()
    with pytest.raises(UnbackdoorError) as refusal:
        evaluate(half, data, precision="bf16", device="cpu")
    assert str(refusal.value) == ("Failing cannot compute in bf16 (got Float and BFloat16). Give `precision='fp32'`.")
    full = Failing("can't allocate memory: you tried to allocate 99 bytes", lambda _, x: len(x) > 8).eval()
    with pytest.raises(RuntimeError, match="allocate memory"):  # the command has a sentence for it
        evaluate(full, data)
