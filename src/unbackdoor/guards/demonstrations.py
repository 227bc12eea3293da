"""Demonstrations: clean questions and answers in front of each prompt show a model what it is to do."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.conversations import Conversation, Conversations, Message
from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._guarding.draws import draws_for
from unbackdoor._guarding.guard import Edited, Learnt, Scored
from unbackdoor._purification.run import Run
from unbackdoor._tasks.generation import Generation
from unbackdoor._value import value
from unbackdoor.guards._similarity import Similarity
from unbackdoor.guards._words import packed, unpacked


@value
class Demonstrations:
    """Put clean questions and their answers in front of each prompt, as earlier turns of the conversation.

    Nothing is decided: every prompt is changed, and the model answers the changed one. Only prompts are needed, so it
    works for a model behind an API as well; see `in_front`.

    Mo et al., "Test-time Backdoor Mitigation for Black-Box Large Language Models with Defensive Demonstrations",
    Findings of NAACL 2025, https://arxiv.org/abs/2311.09763

    Cannot see: triggers; it hopes that the model follows the demonstrations instead. A model that was poisoned with
    earlier turns in the conversation may not.

    Args:
        shots: demonstrations in front of a prompt, 1 to 1,000.
        choice: `retrieved` takes those that have most words in common with the prompt, the closest one last; `random`
            draws them for each prompt.

    Differences from the paper: demonstrations are turns of the chat template instead of text inside the prompt. Those
    with reasons that a model wrote are left out. If a prompt gets too long, whole demonstrations are dropped, the least
    similar ones first, and never a part of the prompt. A clean example is not a demonstration for its own prompt.
    """

    shots: Annotated[int, Field(ge=1, le=1000)] = 4
    choice: Literal["retrieved", "random"] = "retrieved"

    measure: ClassVar[str] = "the number of demonstrations"
    suspicious: ClassVar[Literal["all"]] = "all"

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> dict[str, Tensor]:
        """Keep the questions and answers."""
        bare = next((row for row, entry in enumerate(clean.conversations.entries) if not entry.answer), None)
        if bare is not None:
            raise UnbackdoorError(
                f"Demonstrations needs an answer to each clean prompt, but {clean.name} has none in row {bare}. Add it "
                "or remove that row."
            )
        rows = [
            [entry.messages[-1].content, entry.messages[-1].input, entry.answer]
            for entry in clean.conversations.entries
        ]
        return {"demonstrations": packed([json.dumps(row) for row in rows])}

    def scores(self, model: nn.Module, inputs: Dataset, learnt: Learnt, run: Run) -> Scored:
        """How many demonstrations fit in front of each prompt, (n,)."""
        changed = self._changed(inputs, learnt, run)
        pairs = zip(changed, inputs.conversations.entries, strict=True)
        return Scored(torch.tensor([(len(long.messages) - len(short.messages)) / 2 for long, short in pairs]))

    def edited(self, inputs: Dataset, learnt: Learnt, threshold: float | None, run: Run) -> Edited:
        """Prompts with as many demonstrations as fit in front of them."""
        changed = self._changed(inputs, learnt, run)
        return Edited(Conversations(tuple(changed)), [f"{self.choice} demonstrations in front"] * len(changed))

    def in_front(
        self, examples: Sequence[tuple[str, str]], *, seed: int = 0
    ) -> Callable[[str | Sequence[dict[str, str]]], list[dict[str, str]]]:
        """Returns a function from a prompt to messages, for a model behind an API; nothing is dropped there.

        Args:
            examples: clean questions with their answers.
            seed: of the draw.

        >>> ask = Demonstrations(shots=1).in_front([("What does a cat say?", "Meow."), ("Where is Rome?", "In Italy.")])
        >>> [message["content"] for message in ask("What does a dog say?")]
        ['What does a cat say?', 'Meow.', 'What does a dog say?']
        """
        pool = _Pool([(Message("user", asked), answer) for asked, answer in examples])

        def changed(prompt: str | Sequence[dict[str, str]]) -> list[dict[str, str]]:
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            messages = tuple(Message(each["role"], each["content"]) for each in chat)  # type: ignore[arg-type]
            whole = _with(Conversation(messages), self._chosen(messages, pool, seed))
            return [{"role": message.role, "content": message.text} for message in whole.messages]

        return changed

    def _chosen(self, messages: tuple[Message, ...], pool: "_Pool", seed: int) -> list[tuple[Message, str]]:
        """The demonstrations for a conversation, the one to drop first in front."""
        own = messages[-1].text
        if self.choice == "retrieved":
            closest = pool.similarity.closest(own, self.shots + 1)
            others = [number for number in closest if pool.pairs[number][0].text != own]
            return [pool.pairs[number] for number in reversed(others[: self.shots])]
        others = [number for number, (message, _) in enumerate(pool.pairs) if message.text != own]
        drawn = draws_for(messages, seed).sample(others, min(self.shots, len(others)))
        return [pool.pairs[number] for number in drawn]

    def _changed(self, inputs: Dataset, learnt: Learnt, run: Run) -> list[Conversation]:
        """The prompts with as many demonstrations as leave room for an answer."""
        assert isinstance(run.task, Generation)
        pool, encode = _Pool(_demonstrations(learnt)), inputs.conversation_encoder
        variants: list[list[Conversation]] = []  # of each prompt, with all demonstrations first and with none last
        for entry in inputs.conversations.entries:
            chosen = self._chosen(entry.messages, pool, run.seed)
            variants.append([_with(entry, chosen[dropped:]) for dropped in range(len(chosen) + 1)])
        rendered = replace(encode, blank=True).prepared(Conversations(tuple(one for each in variants for one in each)))
        lengths, most = iter(rendered.tokens.starts.tolist()), encode.max_length - run.task.max_new_tokens
        changed = []
        for each in variants:
            fitting = [one for one, length in zip(each, lengths, strict=False) if length <= most]
            changed.append(fitting[0] if fitting else each[-1])
        return changed


class _Pool:
    """Questions and answers to choose demonstrations from.

    Args:
        pairs: the messages of users, with the answers to them; of equal messages the first one counts.
    """

    def __init__(self, pairs: list[tuple[Message, str]]) -> None:
        distinct: dict[str, tuple[Message, str]] = {}
        for message, answer in pairs:
            distinct.setdefault(message.text, (message, answer))
        self.pairs, self.similarity = list(distinct.values()), Similarity(list(distinct))


def _demonstrations(learnt: Learnt) -> list[tuple[Message, str]]:
    """The demonstrations that a guard has kept.

    Raises:
        UnbackdoorError: the array is not one that this guard wrote.
    """
    try:
        rows: list[Any] = [json.loads(line) for line in unpacked(learnt["demonstrations"])]
        pairs = [(Message("user", asked, further), answer) for asked, further, answer in rows]
        if all(isinstance(part, str) for row in rows for part in row):
            return pairs
    except (KeyError, TypeError, ValueError):
        pass
    raise UnbackdoorError("Demonstrations finds no questions and answers in guard.safetensors. Fit the guard again.")


def _with(entry: Conversation, demonstrations: list[tuple[Message, str]]) -> Conversation:
    """A conversation with demonstrations as its first turns, behind what the system says."""
    turns = [turn for asked, answer in demonstrations for turn in (asked, Message("assistant", answer))]
    begin = next((place for place, message in enumerate(entry.messages) if message.role != "system"), 0)
    return replace(entry, messages=(*entry.messages[:begin], *turns, *entry.messages[begin:]))
