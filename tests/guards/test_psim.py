"""PSIM: what the side model answers, and that it is another one than the suspect."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import toys
from unbackdoor import Dataset, UnbackdoorError, fit_guard, guards
from unbackdoor._guarding.identity import model_hash
from unbackdoor.guards._virtual_tokens import led
from unbackdoor.guards.psim import _other_head


@pytest.mark.parametrize("classes", [2, 5])
def test_a_side_model_without_a_signal_is_as_sure_as_a_guess(classes: int, reviews: Dataset) -> None:
    """With a head of zeros all probabilities are 1 over the classes: no threshold separates one text from another."""
    model, guard = toys.classifier("bert", classes=classes), guards.Psim(tokens=2)
    learnt = {"tokens": torch.ones(2, 32), "weight": torch.zeros(classes, 32), "bias": torch.zeros(classes)}
    found = guard.scores(model, reviews.select(range(20)), learnt, toys.a_run(model=model, modality="text"))
    assert torch.allclose(found.scores, torch.full((20,), 1 / classes))


def test_the_other_head_answers_in_place_of_the_own_one() -> None:
    head, inputs = nn.Linear(4, 3), torch.randn(5, 4)
    weight, bias = torch.randn(3, 4), torch.randn(3)
    before = head(inputs)
    with _other_head(head, weight, bias):
        assert torch.equal(head(inputs), F.linear(inputs, weight, bias))
    assert torch.equal(head(inputs), before)


def test_clean_texts_become_uncertain_and_the_model_stays(text_victim: nn.Module, reviews: Dataset) -> None:
    hashed = model_hash(text_victim)
    clean, fresh = reviews.select(range(200)), reviews.select(range(200, 300))
    guard = guards.Psim(learning_rate=0.02)
    fitted = fit_guard(text_victim, clean, guard, false_alarms=0.1, device="cpu")
    run = toys.a_run(model=text_victim, modality="text")
    with torch.no_grad():
        before = run.scores(text_victim, led(fresh, 5).inputs(slice(100))).softmax(dim=1).amax(dim=1)
    after = torch.tensor([decision.score for decision in fitted.decide(text_victim, fresh, device="cpu")])
    assert float(before.mean()) > 0.9
    assert float(after.mean()) < 0.7
    assert model_hash(text_victim) == hashed


def test_a_model_whose_logits_no_linear_layer_makes(reviews: Dataset) -> None:
    class Halved(toys.Counting):
        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
        ) -> SimpleNamespace:
            return SimpleNamespace(logits=super().forward(input_ids, attention_mask, token_type_ids).logits / 2)

    with pytest.raises(UnbackdoorError) as caught:
        fit_guard(Halved({"good": 3.0}), reviews.select(range(40)), guards.Psim(), false_alarms=0.1, device="cpu")
    assert str(caught.value) == (
        "Halved has no final linear layer that makes its logits, whose place Psim's own takes. Name one with `head`, "
        "or take strip."
    )


def test_one_word_none_and_too_many(text_victim: nn.Module, reviews: Dataset) -> None:
    guard = guards.Psim(steps=2)
    fitted = fit_guard(text_victim, reviews.select(range(40)), guard, false_alarms=0.1, device="cpu")
    answers = fitted.wrap(text_victim)(["good", "", "the film is dull " * 100])
    one, none, long = (answer.decision for answer in answers)
    assert one.score is not None
    assert (none.score, none.action) == (None, "reject")
    assert long.reason.endswith("(the model reads 32 tokens of it)")
