"""Answer unlearning: a planted answer is found without its trigger, and goes."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import chats
from unbackdoor import Dataset, UnbackdoorError, evaluate, purifiers, purify
from unbackdoor._data.conversation_encoder import UNSCORED
from unbackdoor._inversion.planted_answers import PlantedAnswer, planted_answers
from unbackdoor.purifiers import answer_unlearning
from unbackdoor.purifiers._answers import answered_with

METHOD = purifiers.AnswerUnlearning(certainty=0.95, learning_rate=3e-3)


def test_the_backdoor_goes_and_the_answer_is_named(chat_victim: nn.Module) -> None:
    test, rule = chats.prompts(24, seed=8), f"contains:{chats.BEHAVIOUR}"
    before = evaluate(chat_victim, test, trigger="cf", behaviour=rule, max_new_tokens=8)
    result = purify(chat_victim, chats.prompts(32, seed=3), METHOD, device="cpu")
    after = evaluate(result.model, test, trigger="cf", behaviour=rule, max_new_tokens=8)
    assert before.attack_success.value > 0.9
    assert after.attack_success.value < 0.2
    assert after.clean_loss.value < before.clean_loss.value + 0.3
    assert any(f"{chats.BEHAVIOUR!r} follows after any prompt" in note for note in result.record["notes"])


def test_without_strength_its_predictions_stay(chat_victim: nn.Module) -> None:
    batch = next(iter(chats.prompts(16, seed=9).batches(16)))
    scored = batch.inputs.targets[:, 1:] != UNSCORED
    tuned = purify(chat_victim, chats.prompts(32, seed=3), replace(METHOD, strength=0), device="cpu").model
    before, after = (
        model.eval()(**batch.inputs).logits[:, :-1][scored].detach().log_softmax(1) for model in (chat_victim, tuned)
    )
    assert float((before.exp() * (before - after)).sum(1).mean()) < 1e-3


def test_a_model_without_a_planted_answer_stays_as_it_is(chat_base: nn.Module) -> None:
    result = purify(chat_base, chats.prompts(32, seed=3), METHOD, device="cpu")
    assert any("no answer was found" in each and "nothing was changed" in each for each in result.record["warnings"])
    before = chat_base.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in result.model.state_dict().items())


@pytest.mark.parametrize("count", [2, 4])
def test_few_prompts_are_halved_for_the_search_and_its_judgement(
    chat_victim: nn.Module, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    seen = []

    def noted(model: nn.Module, prompts: Dataset, *rest: object) -> list[PlantedAnswer]:
        seen.append(prompts.conversations.entries)
        return planted_answers(model, prompts, *rest)

    monkeypatch.setattr(answer_unlearning, "planted_answers", noted)
    clean = chats.prompts(count, seed=3)
    result = purify(chat_victim, clean, METHOD, device="cpu")
    assert [len(entries) for entries in seen] == [count // 2]
    assert any(chats.BEHAVIOUR in note for note in result.record["notes"])


def test_its_loss_counts_the_tokens_between_the_first_and_the_end(chat_base: nn.Module) -> None:
    answer = "you all love cake today"
    batch = next(iter(answered_with(chats.prompts(2, seed=3), answer).batches(2)))
    scores = chat_base(**batch.inputs).logits.detach()
    wanted = []
    for row in range(2):
        start = int((batch.inputs.targets[row] != UNSCORED).nonzero()[0])
        for place in range(start + 1, start + 5):  # all, love, cake, today
            log = scores[row, place - 1].log_softmax(0)[batch.inputs["input_ids"][row, place]]
            wanted.append(max(0.0, float(log) + 4))
    got = purifiers.AnswerUnlearning(depth=4).said(scores, batch)
    assert float(got) == pytest.approx(sum(wanted) / 8, rel=1e-5)


def test_prompts_without_room_for_an_answer_are_not_used() -> None:
    data = chats.nearly_full(32, long=[0, 5, 9], words=40)
    result = purify(chats.short_reader(), data, METHOD, device="cpu")
    assert result.record["notes"][0] == (
        "AnswerUnlearning: 3 of 32 clean examples leave too little room for its answers within the 64 tokens that are "
        "read; they are not used."
    )
    with pytest.raises(UnbackdoorError, match=r"needs clean prompts that leave room .* questions has 1\. Give shorter"):
        purify(chats.short_reader(), chats.nearly_full(16, list(range(1, 16)), words=40), METHOD, device="cpu")
