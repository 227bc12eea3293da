"""The decisions of each guard of texts about texts that are empty, of one word, or too long for the model."""

import pytest
import torch
from torch import nn

import toys
from unbackdoor import Dataset, fit_guard, guards


@pytest.mark.parametrize(
    "guard",
    [guards.Strip(), guards.BadActs(), guards.Onion(), guards.Rap(steps=2), guards.Psim(steps=2)],
    ids=lambda guard: type(guard).__name__,
)
def test_empty_texts_are_rejected_and_others_have_a_score(guard, text_victim: nn.Module, reviews: Dataset) -> None:
    reference = toys.bigram() if isinstance(guard, guards.Onion) else None
    clean = reviews.select(range(40))
    fitted = fit_guard(text_victim, clean, guard, false_alarms=0.1, reference=reference, device="cpu")
    given = ["good", "", " \n", "unheard", "the film is dull " * 100]
    one, empty, blank, unknown, long = (answer.decision for answer in fitted.wrap(text_victim)(given))
    for decision in (empty, blank):
        assert (decision.action, decision.score) == ("reject", None)
        assert decision.reason == "the text is empty, so nothing can be judged"
    assert all(torch.isfinite(torch.tensor(decision.score)) for decision in (one, unknown, long))
    assert long.reason.endswith("(the model reads 32 tokens of it)")
    again = fitted.wrap(text_victim)(given[::-1])[::-1]
    assert [answer.decision.action for answer in again] == [
        decision.action for decision in (one, empty, blank, unknown, long)
    ]
