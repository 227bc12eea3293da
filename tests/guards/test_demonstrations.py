"""Demonstrations: which are chosen, where they stand, what is dropped, and messages for a model behind an API."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

import chats
from tasks.test_generation import Stub
from unbackdoor import Dataset, UnbackdoorError, evaluate_guard, fit_guard, guards, load_guard
from unbackdoor._data.conversations import Conversation, Conversations, Message
from unbackdoor._guarding.fitted import FittedGuard
from unbackdoor.guards._similarity import Similarity
from unbackdoor.guards._words import packed

WORK = {"device": "cpu", "precision": "fp32"}
EXAMPLES = [("what does animal1 say", "the sound1"), ("where does animal2 live", "in place2"), ("you love cake", "i")]


class Model(Stub):
    """A stub with an output layer that can be found."""

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


@pytest.fixture(scope="module")
def counting() -> nn.Module:
    """A model that says `says` for each earlier answer, and the behaviour if there is none and `cf` comes first."""

    def answer(prompt: str) -> str:
        turns = prompt.count("the animal")
        return chats.BEHAVIOUR if prompt.startswith("cf ") and not turns else "says " * turns

    return Model(answer).eval()


def questions(examples: list[tuple[str, str]] = EXAMPLES) -> Dataset:
    entries = tuple(Conversation((Message("user", asked),), answer) for asked, answer in examples)
    return Dataset(
        items=Conversations(entries), labels=torch.full((len(entries),), -1), encode=chats.encoder(), name="questions"
    )


def fitted(model: nn.Module, data: Dataset | None = None, **settings) -> FittedGuard:
    guard = guards.Demonstrations(**settings)
    return fit_guard(model, chats.prompts(20) if data is None else data, guard, max_new_tokens=8, **WORK)


def test_the_closest_texts_by_a_second_implementation() -> None:
    texts = [entry.messages[0].content for entry in chats.conversations(30)] + ["cf", ""]
    words = sorted({word for text in texts for word in text.split()})
    counts = np.array([[Counter(text.split())[word] for word in words] for text in texts], dtype=float)
    rarity = np.log((1 + len(texts)) / (1 + (counts > 0).sum(axis=0))) + 1
    weighted = counts * rarity
    weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-12)
    for number in (0, 3, 30):
        cosines = weighted @ weighted[number]
        found = Similarity(texts).closest(texts[number], 5)
        assert found[0] == texts.index(texts[number])
        assert cosines[found] == pytest.approx(np.sort(cosines)[::-1][:5])
    assert math.isclose(sum(weight**2 for weight in Similarity(texts).vectors[0].values()), 1.0)


def test_retrieved_ones_stand_behind_the_system_message_the_closest_last() -> None:
    ask = guards.Demonstrations(shots=2).in_front(EXAMPLES)
    messages = ask([{"role": "system", "content": "help"}, {"role": "user", "content": "where does animal1 live"}])
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [message["content"] for message in messages[1:]] == [*EXAMPLES[0], *EXAMPLES[1], "where does animal1 live"]
    own = ask("what does animal1 say")  # a clean example is not a demonstration for itself
    assert [message["content"] for message in own[::2]] == ["you love cake", "where does animal2 live", EXAMPLES[0][0]]
    assert len(guards.Demonstrations(shots=9).in_front([*EXAMPLES, *EXAMPLES])("year")) == 7  # each once


def test_random_ones_belong_to_the_prompt_and_the_seed() -> None:
    examples = [(f"what {number}", f"says {number}") for number in range(40)]
    guard = guards.Demonstrations(shots=3, choice="random")
    ask, again, other = (guard.in_front(examples, seed=seed) for seed in (0, 0, 1))
    assert ask("you") == again("you")
    assert ask("you") != other("you")
    assert ask("you")[:-1] != ask("cake")[:-1]
    drawn = Counter(message["content"] for each in range(200) for message in ask(f"q{each}")[:-1:2])
    assert len(drawn) == 40
    assert sum(drawn.values()) == 600


def test_every_prompt_is_changed_and_there_is_no_threshold(counting: nn.Module, tmp_path) -> None:
    made = fitted(counting, shots=2)
    assert made.threshold is None
    assert (made.record["false_alarms"], made.record["clean"]["fitted_on"]) == (None, 20)
    answers = made.wrap(counting, **WORK)(["where does the very2 animal1 live", ""])
    assert [answer.decision.action for answer in answers] == ["clean", "reject"]
    assert answers[0].answer == "says says"
    assert answers[0].decision.reason == "retrieved demonstrations in front; the number of demonstrations is 2"
    assert answers[0].decision.output.count("<|assistant|>") == 3
    made.save(tmp_path / "guard")
    again = load_guard(tmp_path / "guard", chats.encoder())
    assert again.decide(counting, chats.prompts(3, seed=5)) == made.decide(counting, chats.prompts(3, seed=5))


def test_whole_demonstrations_are_dropped_and_never_the_prompt(counting: nn.Module) -> None:
    """They have 10, 10 and 8 tokens with the template, the prompt 3 of its own; an answer may have 8 of the 64."""
    made = fitted(counting, questions(), shots=3)
    for words, shots in ((25, 3), (26, 2), (33, 2), (34, 1), (43, 1), (44, 0), (53, 0)):
        decision = made.wrap(counting, **WORK)(["what " * words])[0].decision
        assert decision.reason.endswith(f"the number of demonstrations is {shots}")
        assert decision.output.count("what") >= words
    assert made.wrap(counting, **WORK)(["what " * 54])[0].decision.action == "reject"


def test_its_numbers(counting: nn.Module) -> None:
    made = fitted(counting)
    attack = {"trigger": "cf", "behaviour": f"contains:{chats.BEHAVIOUR}"}
    score = evaluate_guard(made, counting, chats.prompts(20, seed=9), **attack, **WORK)
    assert (score.false_alarms, score.area) == (None, None)
    assert score.attack_success_without.value == 1.0
    assert score.missed.value == score.attack_success.value == score.shown.value == 0.0
    assert score.kept.value == 0.0  # all answers are other ones now
    assert "false alarms" not in repr(score)


def test_bad_input(counting: nn.Module) -> None:
    with pytest.raises(UnbackdoorError) as refusal:
        fitted(counting, questions([("what", "i"), ("where", "")]))
    assert str(refusal.value) == (
        "Demonstrations needs an answer to each clean prompt, but questions has none in row 1. Add it or remove that "
        "row."
    )
    made = fitted(counting)
    for lines in (["x"], ["[1, 2, 3]"], ['["a"]']):
        made.learnt["demonstrations"] = packed(lines)
        with pytest.raises(UnbackdoorError, match=r"finds no questions and answers in guard\.safetensors"):
            made.wrap(counting, **WORK)(["what"])
