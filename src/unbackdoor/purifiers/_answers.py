"""Changes of the answers of conversations, for methods that tune towards others than those of the clean data."""

from dataclasses import replace

from torch import Tensor

from unbackdoor._data.conversation_encoder import UNSCORED, AnswerTokens
from unbackdoor._data.conversations import Conversations
from unbackdoor._data.dataset import Dataset


def answered_with(data: Dataset, answer: str) -> Dataset:
    """The same prompts, all with one answer."""
    entries = tuple(replace(entry, answer=answer) for entry in data.conversations.entries)
    return replace(data, items=Conversations(entries))


def beginning_with(inputs: AnswerTokens, count: int) -> AnswerTokens:
    """The same tokens with only the first `count` of each answer as targets."""
    scored = inputs.targets != UNSCORED
    return AnswerTokens(dict(inputs), inputs.targets.where(scored.cumsum(dim=1) <= count, UNSCORED))


def starts(inputs: AnswerTokens) -> Tensor:
    """Where the answers begin, (batch,), int64."""
    return (inputs.targets != UNSCORED).long().argmax(dim=1)
