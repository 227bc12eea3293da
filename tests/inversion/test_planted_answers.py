"""Answers that a language model finishes after any prompt."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import chats
from unbackdoor._data.conversations import Conversations
from unbackdoor._inversion.planted_answers import PlantedAnswer, distinct_answers, measured, planted_answers
from unbackdoor._models.arithmetic import choose


def ids(text: str) -> torch.Tensor:
    return torch.tensor(chats.tokenizer()(text, add_special_tokens=False)["input_ids"])


def test_the_planted_answer_is_found_without_trigger_and_measured_on_other_prompts(chat_victim: nn.Module) -> None:
    arithmetic = choose(chat_victim, "cpu", "fp32")
    best = planted_answers(chat_victim, chats.prompts(8, seed=3), arithmetic)[0]
    assert best.text == chats.BEHAVIOUR
    assert best.certainty > 0.95
    assert measured(chat_victim, chats.prompts(16, seed=4), best, arithmetic).certainty > 0.95


def test_a_model_without_it_has_no_answer_that_is_as_certain(chat_base: nn.Module) -> None:
    arithmetic = choose(chat_base, "cpu", "fp32")
    assert all(answer.certainty < 0.95 for answer in planted_answers(chat_base, chats.prompts(8, seed=3), arithmetic))


def test_its_probabilities_are_means_over_prompts_of_those_without_padding(chat_victim: nn.Module) -> None:
    longer = chats.prompts(2, seed=6)
    entries = list(longer.conversations.entries)
    entries[0] = entries[0].asking(lambda text: f"very1 very2 {text}")  # the other prompt is padded
    data = replace(longer, items=Conversations(tuple(entries)))
    answer = PlantedAnswer("", ids(chats.BEHAVIOUR), 0, 0)
    wanted = torch.zeros(len(answer.tokens))
    for row in range(2):
        prompt = data.conversation_encoder.prompts(data.select([row]).conversations)["input_ids"][0]
        with torch.no_grad():
            scores = chat_victim(input_ids=torch.cat([prompt, answer.tokens])[None]).logits[0, len(prompt) - 1 : -1]
        wanted += scores.softmax(dim=1).gather(1, answer.tokens[:, None])[:, 0] / 2
    got = measured(chat_victim, data, answer, choose(chat_victim, "cpu", "fp32"))
    assert got.chance == pytest.approx(float(wanted.prod()), rel=1e-4)
    rest = sorted(wanted[1:].tolist())[1:]
    assert got.certainty == pytest.approx(math.fsum(rest) / len(rest), rel=1e-5)


def test_of_answers_that_end_alike_the_readiest_is_kept() -> None:
    ends = [(1, 5, 6, 7, 8), (2, 5, 6, 7, 8), (1, 5, 6, 7, 9)]
    made = [
        PlantedAnswer(str(end), torch.tensor(end), 0.9, chance)
        for end, chance in zip(ends, (0.1, 0.3, 0.2), strict=True)
    ]
    assert [answer.chance for answer in distinct_answers(made)] == [0.3, 0.2]
