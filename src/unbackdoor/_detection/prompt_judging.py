"""Judging what was found in a language model on held-out prompts: how many of them it moves."""

from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from unbackdoor._data.conversations import Conversations
from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.finding import Candidate
from unbackdoor._detection.judging import ExactShare
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.decoding import answers
from unbackdoor._models.language_models import context_of
from unbackdoor._models.likely_answers import ReadPrompts
from unbackdoor._poisoning.trigger import Trigger

ROOM = 24  # tokens that a prompt must leave, for a trigger
TOKENS = 16  # of the answers that are judged


@dataclass(frozen=True)
class HeldOutPrompts:
    """Clean prompts that no search has seen.

    Args:
        model: the suspect.
        data: the prompts.
        arithmetic: of decoding.
    """

    model: nn.Module
    data: Dataset
    arithmetic: Arithmetic

    @cached_property
    def plain(self) -> list[str]:
        """How the model's answers to the prompts begin."""
        return self.answers(self.data)

    def answers(self, data: Dataset) -> list[str]:
        """How the model's answers to prompts begin."""
        return answers(self.model, data, self.arithmetic, TOKENS)

    def judged(self, candidate: Candidate) -> tuple[ExactShare | None, ExactShare | None]:
        """How many prompts a finding and its random control move; None for what is neither trigger nor answer.

        Of a trigger: the prompts whose answer begins as its behaviour says, among those whose answer does not begin so
        without it. Of an answer: the prompts at which the model, given its first token, says the rest.
        """
        if candidate.answer:
            others = self.others(candidate)
            if len(others) == 0:
                return ExactShare(0, 0), ExactShare(0, 0)
            read = ReadPrompts(self.model, others, self.arithmetic)
            ours, random = (read.follows(each) for each in (candidate.answer, candidate.control_answer))
            return ExactShare(int(ours.sum()), len(ours)), ExactShare(int(random.sum()), len(random))
        if candidate.trigger is None:
            return None, None
        control = candidate.control
        return self.moved(candidate.trigger, candidate), None if control is None else self.moved(control, candidate)

    def moved(self, trigger: Trigger, candidate: Candidate) -> ExactShare:
        """How many prompts a trigger gives the answer of its behaviour."""
        chosen = self.others(candidate)
        if len(chosen) == 0:
            return ExactShare(0, 0)
        assert trigger.behaviour is not None
        shown = replace(chosen, items=trigger.stamp(chosen.items))
        return ExactShare(sum(map(trigger.behaviour.shown, self.answers(shown))), len(chosen))

    def others(self, candidate: Candidate) -> Dataset:
        """The prompts that a finding could move: the right answer, and with a trigger the model's own, is another.

        Those that a trigger or its control would make too long for an answer are left out.
        """
        behaviour = candidate.trigger and candidate.trigger.behaviour
        rows = [
            row
            for row, entry in enumerate(self.data.conversations.entries)
            if not entry.answer.startswith(candidate.name) and not (behaviour and behaviour.shown(self.plain[row]))
        ]
        chosen = self.data.select(rows)
        most = context_of(self.model) - TOKENS
        for trigger in (candidate.trigger, candidate.control):
            if trigger is not None:
                shown = trigger.stamp(chosen.conversations)
                assert isinstance(shown, Conversations)
                chosen = chosen.select(chosen.conversation_encoder.with_room(shown, most))
        return chosen


def with_room(data: Dataset) -> Dataset:
    """The rows that are short enough to carry a trigger.

    Raises:
        UnbackdoorError: there are none.
    """
    longest = data.conversation_encoder.max_length - ROOM
    rows = (data.conversations.tokens.lengths.cpu() <= longest).nonzero().flatten()
    if len(rows) == 0:
        raise UnbackdoorError(
            f"{data.name} has no row of at most {longest} tokens, so none leaves {ROOM} for a trigger. Raise "
            "`max_length`, or give shorter rows."
        )
    return data if len(rows) == len(data) else data.select(rows)
