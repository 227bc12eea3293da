"""The decisions of each guard of texts about texts that are empty, of one word, or too long for the model."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import toys
from unbackdoor import Dataset, fit_guard, guards, load
from unbackdoor._models import calling


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


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_text_with_the_token_that_ends_texts_stops_no_others(name: str, tmp_path: Path) -> None:
    """Such a model answers at the last one of each, and takes only texts that hold it equally often."""
    model, encode = load(toys.write(toys.classifier(name), tmp_path))
    clean = dataclasses.replace(toys.reviews(40).encoded_by(encode), classes=calling.class_names(model))
    fitted = fit_guard(model, clean, guards.Strip(copies=2), false_alarms=0.1, device="cpu")
    end = encode.tokenizer.convert_ids_to_tokens(encode.end)
    wrapped = fitted.wrap(model, device="cpu")
    for given in ([f"good {end} film"], [f"good {end} film", "the film is dull"], ["the film is dull", f"{end} {end}"]):
        for answer, text in zip(wrapped(given), given, strict=True):
            if end in text:
                assert (answer.decision.action, answer.decision.score) == ("reject", None)
                assert answer.decision.reason == (
                    f"the text has the token {end} of its own, and the model answers at the last one"
                )
            else:
                assert answer.decision == dataclasses.replace(wrapped(text)[0].decision, row=answer.decision.row)
