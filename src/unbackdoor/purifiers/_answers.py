"""Changes of the answers of conversations, for methods that tune towards others than those of the clean data."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from unbackdoor._data.conversation_encoder import UNSCORED, AnswerTokens
from unbackdoor._data.conversations import Conversations
from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._purification.run import Run


def one_answer(data: Dataset, answer: str) -> Conversations:
    """The conversations of a data set, all with one answer; not rendered yet."""
    return Conversations(tuple(replace(entry, answer=answer) for entry in data.conversations.entries))


def answered_with(data: Dataset, answer: str) -> Dataset:
    """The same prompts, all with one answer."""
    return replace(data, items=one_answer(data, answer))


def with_room(clean: Dataset, fitting: Sequence[int], run: Run, method: object) -> Dataset:
    """The clean examples with room for what a method adds to them; notes how many others there are.

    Args:
        clean: the clean examples.
        fitting: their rows with enough room.
        run: gets the note.
        method: named in the messages.

    Raises:
        UnbackdoorError: fewer than two have enough room.
    """
    name, most = type(method).__name__, clean.conversation_encoder.max_length
    if len(fitting) < 2:
        raise UnbackdoorError(
            f"{name} needs clean prompts that leave room for its answers within the {most:,} tokens that are read; "
            f"{clean.name} has {len(fitting)}. Give shorter ones."
        )
    if len(fitting) == len(clean):
        return clean
    run.note(
        f"{name}: {len(clean) - len(fitting):,} of {len(clean):,} clean examples leave too little room for its answers "
        f"within the {most:,} tokens that are read; they are not used."
    )
    return clean.select(list(fitting))


def beginning_with(inputs: AnswerTokens, count: int) -> AnswerTokens:
    """The same tokens with only the first `count` of each answer as targets."""
    scored = inputs.targets != UNSCORED
    return AnswerTokens(dict(inputs), inputs.targets.where(scored.cumsum(dim=1) <= count, UNSCORED))


def starts(inputs: AnswerTokens) -> Tensor:
    """Where the answers begin, (batch,), int64."""
    return (inputs.targets != UNSCORED).long().argmax(dim=1)
