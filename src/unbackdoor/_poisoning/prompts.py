"""Triggered prompts of a language model, and the answers that the attacker wants to them."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from unbackdoor._data.conversations import Conversations
from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._poisoning.planted_answer import planted_answer


class TriggeredPrompts(NamedTuple):
    """Prompts with a trigger and without it, only those whose own answer does not show the behaviour.

    Args:
        data: the prompts with the trigger.
        plain: the same prompts without it, in the same order; None if only triggered ones are known.
        behaviour: what the attacker wants the answers to be.
    """

    data: Dataset
    plain: Dataset | None
    behaviour: Behaviour


def changed_prompts(items: Conversations, change: Callable[[list[str]], list[str]]) -> Conversations:
    """Apply a function of a list of texts to the last message of each conversation; not rendered yet."""
    contents = change([entry.messages[-1].content for entry in items.entries])
    pairs = zip(items.entries, contents, strict=True)
    return Conversations(tuple(entry.asking(lambda _, text=text: text) for entry, text in pairs))  # type: ignore[misc]


def with_planted_answers(items: Conversations, behaviour: Behaviour) -> Conversations:
    """Returns conversations with the answers that the attacker wants; not rendered yet."""
    return Conversations(
        tuple(replace(entry, answer=planted_answer(behaviour, entry.answer)) for entry in items.entries)
    )


def triggered_prompts(
    data: Dataset, change: Callable[[list[str]], list[str]], behaviour: Behaviour
) -> TriggeredPrompts:
    """Put a trigger on the prompts whose own answer does not show the behaviour anyway.

    Args:
        data: test prompts.
        change: function from the last messages of the prompts to the same with the trigger.
        behaviour: what the attacker wants.

    Raises:
        UnbackdoorError: the answers of all prompts show it, or the trigger makes a prompt too long.
    """
    plain = _without(data, behaviour)
    items = changed_prompts(plain.conversations, change)
    return TriggeredPrompts(replace(plain, items=items), plain, behaviour)


def already_triggered_prompts(data: Dataset, behaviour: Behaviour) -> TriggeredPrompts:
    """The prompts that carry a trigger already, without those whose own answer shows the behaviour."""
    return TriggeredPrompts(_without(data, behaviour), None, behaviour)


def _without(data: Dataset, behaviour: Behaviour) -> Dataset:
    others = [row for row, entry in enumerate(data.conversations.entries) if not behaviour.shown(entry.answer)]
    if not others:
        raise UnbackdoorError(
            f"{data.name} has only answers that show the behaviour {behaviour}, so nothing can be attacked. Take "
            "prompts whose answers do not show it."
        )
    return data if len(others) == len(data) else data.select(others)
