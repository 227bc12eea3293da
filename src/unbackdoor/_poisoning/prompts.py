"""Triggered prompts of a language model, and the answers that the attacker wants to them."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from unbackdoor._data.conversations import Conversations
from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._poisoning.planted_answer import planted_answer

logger = logging.getLogger("unbackdoor")


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

    Prompts that are too long with the trigger are left out and counted.

    Args:
        data: test prompts.
        change: function from the last messages of the prompts to the same with the trigger.
        behaviour: what the attacker wants.

    Raises:
        UnbackdoorError: the answers of all prompts show it, or all prompts are too long with the trigger.
    """
    plain = _without(data, behaviour)
    items = changed_prompts(plain.conversations, change)
    rows = fitting_with_trigger(plain, items, "are not scored with it")
    if len(rows) < len(plain):
        plain, items = plain.select(rows), items[rows]
    return TriggeredPrompts(replace(plain, items=items), plain, behaviour)


def trainable(attacked: TriggeredPrompts) -> TriggeredPrompts:
    """Those of some triggered prompts that are short enough for the planted answer as well; tells how many are not."""
    planted = with_planted_answers(attacked.data.conversations, attacked.behaviour)
    rows = fitting_with_trigger(attacked.data, planted, "are not trained on with the answer that the attacker wants")
    plain = None if attacked.plain is None else attacked.plain.select(rows)
    return attacked._replace(data=attacked.data.select(rows), plain=plain)


def fitting_with_trigger(plain: Dataset, items: Conversations, what_of_others: str) -> Tensor:
    """Returns the rows that the model reads whole with a trigger as well, (n,); tells the user how many others are.

    Args:
        plain: prompts.
        items: the same with the trigger, and perhaps with other answers.
        what_of_others: clause on what becomes of the others, for the user.

    Raises:
        UnbackdoorError: there are none.
    """
    encode = plain.conversation_encoder
    rows = encode.fitting(items)
    if not rows:
        raise UnbackdoorError(
            f"{plain.name} has no row of at most {encode.max_length:,} tokens once the trigger is in it, prompt and "
            "answer together. Take shorter rows, or a shorter trigger."
        )
    if len(rows) < len(plain):
        logger.info(
            "%s: %s rows have more than %s tokens with the trigger; they %s.",
            plain.name,
            f"{len(plain) - len(rows):,} of {len(plain):,}",
            f"{encode.max_length:,}",
            what_of_others,
        )
    return torch.tensor(rows)


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
